"""SLERP: the point at the fraction t of the arc from Left to Right.

    sin((1 - t) theta) / sin(theta) W_L + sin(t theta) / sin(theta) W_R,   theta the angle between the flat tensors

Tensors whose cosine is above 0.9995, as for most fine-tunes of one backbone, are interpolated on the straight line;
`nuslerp` always uses the arc.

Source: Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985); the threshold is the usual one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import combination, gram
from branchmerge.merge.operators.limits import number
from branchmerge.merge.operators.sphere import arc

SINE = sqrt(1 - 0.9995**2)


@dataclass(frozen=True)
class Slerp(Operator):
    """Left and Right -> a point on the arc between them."""

    t: float = 0.5
    """Where on the arc: 0 is Left, 1 is Right."""

    n_way: ClassVar[bool] = False
    late = frozenset({"t"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", number("t", self.t, 0, 1))

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        left, right = models
        return gram([left, right])

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        return combination(arc(measured, self.t, SINE), models)
