"""What every merge operator is: a frozen dataclass of parameters, called with the same tensor of each model.

An operator works in two steps. `measure` looks at whole tensors once (a norm, a quantile, a divergence); `apply` makes
the merged tensor from what was measured. An operator that needs no look at the whole leaves `measure` as it is. Models
that are merged with several values of a parameter named in `late` are measured once for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from branchmerge.merge.arrays import Array
    from branchmerge.merge.scan import Change


@dataclass(frozen=True)
class Operator(ABC):
    """A pure function of tensors; knows nothing of files, names, trees or threads."""

    n_way: ClassVar[bool] = True
    """Takes any number of models; else exactly two, Left and Right."""
    selects: ClassVar[bool] = False
    """Takes every value over from one of the models, so that a density says how much it took from each."""
    takes_arrays: ClassVar[bool] = False
    """Merges numpy arrays into one, too, without torch; what it is given then are the arrays of arrays.py."""
    proves_finite: ClassVar[bool] = False
    """Measures models with NaN or infinity without an error, and `shows_finite` tells."""
    late: ClassVar[frozenset[str]] = frozenset()
    """Parameters that `measure` does not look at."""

    def needs_base(self) -> bool:
        """Whether it needs the backbone that the models were fine-tuned from; a parameter may decide that."""
        return False

    def is_portable(self) -> bool:
        """Whether it gives the same bytes on every CPU; a parameter may decide that."""
        return True

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> Any:
        """What `apply` must know of the whole tensors."""
        return None

    @abstractmethod
    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        """The merged tensor."""

    def apply_and_compare(
        self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None, spare: Array | None = None
    ) -> tuple[Tensor, Change | None]:
        """The merged tensor, and how far it is from the first model where that is known without another look.

        Args:
            spare: an array like the models, perhaps one of them, that the result may be written to
        """
        return self.apply(measured, models, base), None

    def shows_finite(self, measured: Any) -> bool:
        """Whether the measured values prove that no model holds NaN or infinity; spares another look at the models."""
        return False

    def facts(self, measured: Any) -> dict[str, float]:
        """Of what was measured, what belongs into the table of the merged model."""
        return {}

    def __call__(self, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        """Merge one tensor.

        Args:
            models: the tensor of each model, all of one shape and one floating-point dtype, as they are stored
            base: the backbone's

        Returns:
            The merged tensor, float64 where a model is, else float32; in the models' own dtype where every value is
            taken over from one of them.

        Raises:
            ValueError: the parameters do not fit the number of models, or the backbone is not given
        """
        return self.apply(self.measure(models, base), models, base)
