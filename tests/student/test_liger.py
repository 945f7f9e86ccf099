"""liger-kernel's own Triton kernels on a CPU, by Triton's interpreter: losses and gradients.

Triton decides when it is imported whether it interprets, so all of it runs in one process of its own (this file). The
products around the kernels are torch's; those that liger-kernel takes on CUDA only (`torch.mm(out=)`,
`torch.addmm(out_dtype=)`) are not tried here. The interpreter rounds bfloat16 towards zero, a GPU to the nearest.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SHAPES = [
    (1, 16, 7),  # rows, hidden size, vocabulary
    (3, 16, 150),  # every row is a chunk
    (67, 48, 200),  # chunks of 16 rows, and one of 3
    (33, 96, 50),  # one chunk
    (32, 32, 128),
    (3, 8, 32769),  # more words than the kernel takes at once, by one
]
KINDS = ["float32", "bfloat16", "autocast"]
IGNORED = -100
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2, "autocast": 1.5e-2}
SHARE = 1 / 103
"""The loss's gradient; 1 passes over one of the kernels."""

CASES = [(*shape, kind, ignored) for shape in SHAPES for kind in KINDS for ignored in ("none", "some", "all")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels gave, of all cases: the process is started once."""
    for module in ("liger_kernel", "triton"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    answer = tmp_path_factory.mktemp("liger") / "answer.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(answer)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_those_of_torch_and_of_the_chunked_loss(
    shape: tuple[int, int, int], kind: str, ignored: str, found: dict[str, Any]
) -> None:
    errors = found["errors"][_name(*shape, kind, ignored)]
    if ignored != "none":
        assert errors["ignored"] == 0  # gradients of rows that are not learned
    for reference in ("torch", "chunked"):
        loss, *gradients = errors[reference]
        assert loss < 1e-5
        assert max(gradients) < TOLERANCE[kind], errors


def test_both_kernels_were_interpreted(found: dict[str, Any]) -> None:
    assert found["kinds"] == ["InterpretedFunction"] * 2
    assert min(found["launches"]) > 0


def test_the_trial_finds_them_right_and_runs_both(found: dict[str, Any]) -> None:
    assert found["why_not"] == ["", "", ""]
    assert min(found["launches of the trial"]) > 0


def test_rows_that_teach_nothing_are_no_work(found: dict[str, Any]) -> None:
    assert found["empty"] == [0.0, 0.0]


def _name(*case: object) -> str:
    return " ".join(map(str, case))


class _Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


def _main(answer: Path) -> None:
    from liger_kernel.ops import fused_linear_cross_entropy as ops
    from torch.nn.functional import cross_entropy

    from branchmerge.student.chunked_loss import summed_cross_entropy
    from branchmerge.student.liger_loss import liger_cross_entropy, why_not

    names = ("liger_cross_entropy_kernel", "element_mul_kernel")
    kinds = [type(getattr(ops, name)).__name__ for name in names]
    counted = [_Counted(getattr(ops, name)) for name in names]
    for name, kernel in zip(names, counted, strict=True):
        setattr(ops, name, kernel)
    draw = torch.Generator().manual_seed(1)

    def by_torch(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype
        return cross_entropy((hidden.to(dtype) @ head.to(dtype).T).float(), labels, reduction="sum")

    def by_rows(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        learned = labels != IGNORED
        return summed_cross_entropy(hidden[learned], head, labels[learned])

    def graded(function: Any, kind: str, share: float, hidden: Tensor, head: Tensor, labels: Tensor) -> list[Tensor]:
        hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = function(hidden, head, labels)
        gradients = torch.autograd.grad(loss * share, (hidden, head))
        assert [gradient.dtype for gradient in gradients] == [hidden.dtype, head.dtype]
        return [loss.detach().double(), *(gradient.double() for gradient in gradients)]

    def off(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / other.norm()) if other.any() else float(one.norm())

    errors: dict[str, Any] = {}
    for rows, width, words, kind, ignored in CASES:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        hidden = torch.randn(rows, width, generator=draw).to(dtype)
        head = (2 * width**-0.5 * torch.randn(words, width, generator=draw)).to(dtype)
        labels = torch.randint(words, (rows,), generator=draw)
        labels[{"none": slice(0), "some": slice(0, rows - 1, 3), "all": slice(None)}[ignored]] = IGNORED
        share = 1.0 if words > 30_000 else SHARE  # interpreted, it is one call a word
        mine, plain, chunked = (
            graded(function, kind, share, hidden, head, labels) for function in (liger_cross_entropy, by_torch, by_rows)
        )
        errors[_name(rows, width, words, kind, ignored)] = {
            "torch": list(map(off, mine, plain)),
            "chunked": list(map(off, mine, chunked)),
            "ignored": float(mine[1][labels == IGNORED].abs().sum()),
        }
    launches = [kernel.launches for kernel in counted]
    cpu = torch.device("cpu")
    trials = ((16, 130, torch.float32, 1e-4), (16, 130, torch.bfloat16, 2e-2), (80, 50, torch.bfloat16, 2e-2))
    reasons = [why_not(width, words, cpu, dtype, tolerance) for width, words, dtype, tolerance in trials]
    of_trial = [kernel.launches - before for kernel, before in zip(counted, launches, strict=True)]
    hidden, head = torch.randn(5, 8, generator=draw), torch.randn(20, 8, generator=draw).requires_grad_()
    labels = torch.randint(20, (5,), generator=draw)
    empty = liger_cross_entropy(hidden[:0].requires_grad_(), head, labels[:0])
    none = torch.autograd.grad(empty, head)[0]
    results = {
        "kinds": kinds, "errors": errors, "launches": launches, "why_not": reasons, "launches of the trial": of_trial,
        "empty": [float(empty), float(none.abs().sum())],
    }  # fmt: skip
    answer.write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(Path(sys.argv[1]))
