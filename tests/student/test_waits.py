"""How often a training asks a tensor for its values. On a GPU each time waits until all work so far is done."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from branches import branch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from branchmerge.student.training import train

PACKAGES = ("branchmerge", "transformers", "lightning")
ONCE_A_ROW = {
    "_attend",  # only on a CPU: a document at a time
}


class Operations(TorchDispatchMode):
    """Counts those whose result, or its size, depends on values, by the function that called for them."""

    def __init__(self, by: Counter[str]) -> None:
        super().__init__()
        self.by = by

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.by[_caller(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """The same of `tolist`, which is no operation."""

    def __init__(self, by: Counter[str]) -> None:
        super().__init__()
        self.by = by

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            self.by[_caller(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))


def _caller(frame: FrameType | None) -> str:
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in PACKAGES:
            return frame.f_code.co_name
        frame = frame.f_back
    return "?"


def waits(student: Path, outputs: Path, rows: int) -> Counter[str]:
    """Of a training of one step."""
    settings = branch(
        student, outputs, "domain=math", f"optim.global_batch={rows}", "optim.max_steps=1", "optim.epochs=2"
    )
    found: Counter[str] = Counter()
    with Operations(found), Lists(found):
        train(settings)
    return found


def test_more_rows_in_a_step_wait_no_more_often(tiny_student: Path, tmp_path: Path) -> None:
    two, four = (waits(tiny_student, tmp_path / str(rows), rows) for rows in (2, 4))
    more = {name: four[name] - two[name] for name in four | two if four[name] != two[name]}
    assert two["configure_gradient_clipping"] >= 1  # they are seen
    assert set(more) <= ONCE_A_ROW
