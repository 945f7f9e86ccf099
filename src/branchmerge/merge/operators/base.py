"""The interface of a merge operator: a frozen dataclass of parameters, called with the same tensor of each model.

An operator works in two steps. `measure` reads the whole tensors once (for a norm, a quantile, a divergence); `apply`
makes the merged tensor from these measurements. An operator that needs none keeps the default `measure`. A sweep over a
parameter named in `late` measures once for all its values.
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
    """Every value of the result is that of one of the models, so the share taken from each is well defined."""
    takes_arrays: ClassVar[bool] = False
    """Also merges numpy arrays (those of arrays.py), without importing torch."""
    proves_finite: ClassVar[bool] = False
    """`measure` accepts NaN and infinity, and `shows_finite` tells from its result whether there were any."""
    late: ClassVar[frozenset[str]] = frozenset()
    """Parameters that `measure` does not depend on."""

    def needs_base(self) -> bool:
        """Whether it needs the backbone that the models were fine-tuned from; a parameter may decide that."""
        return False

    def is_portable(self) -> bool:
        """Whether it gives the same bytes on every CPU; a parameter may decide that."""
        return True

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> Any:
        """What `apply` needs to know about the whole tensors."""
        return None

    @abstractmethod
    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        """The merged tensor."""

    def apply_and_compare(
        self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None, spare: Array | None = None
    ) -> tuple[Tensor, Change | None]:
        """The merged tensor, and its change from the first model where that is known without reading both again.

        Args:
            spare: an array of the models' shape and dtype, perhaps one of them, that may be overwritten with the result
        """
        return self.apply(measured, models, base), None

    def shows_finite(self, measured: Any) -> bool:
        """Whether the measurements prove that no model holds NaN or infinity; saves reading the models again."""
        return False

    def facts(self, measured: Any) -> dict[str, float]:
        """Measurements that are reported in the merged model's tensors.json."""
        return {}

    def __call__(self, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        """Merge one tensor.

        Args:
            models: the tensor of each model, all of one shape and one floating-point dtype, as they are stored
            base: the backbone's

        Returns:
            The merged tensor: float64 if a model is, else float32; in the models' own dtype where the operator
            `selects`.

        Raises:
            ValueError: the parameters do not fit the number of models, or the backbone is not given
        """
        return self.apply(self.measure(models, base), models, base)
