"""The cross-entropy of chunked_loss.py by liger-kernel's fused Triton kernel: an option on CUDA.

Source: Liger Kernel (arXiv 2410.10989). Shapes: N rows, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from branchmerge.errors import UserError
from branchmerge.student.autocast import compute_dtype
from branchmerge.student.chunked_loss import summed_cross_entropy

PACKAGE = "liger-kernel"
ROWS, WORDS, WIDTH = 67, 4096, 64
"""Sizes of the trials: rows, and the largest vocabulary and hidden size of a trial that tests the other one"""
SHARE = 1 / 103
"""The gradient of the loss in the trials: as in training not 1, for which a kernel would be skipped"""


def liger_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Like `summed_cross_entropy`; the head's gradient is summed in float32 too, and rounded to the products' dtype."""
    if not len(hidden):  # liger's kernel divides by it
        return summed_cross_entropy(hidden, head, labels)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = liger_fused_linear_cross_entropy(
            hidden.to(dtype), head.to(dtype), labels, reduction="sum", accum_dtype=torch.float32
        )
    return loss.float()


def why_not(hidden_size: int, vocabulary: int, device: torch.device, dtype: torch.dtype, tolerance: float) -> str:
    """Why the kernels cannot be used here, by trials against `summed_cross_entropy`; empty if they can.

    One trial has the model's hidden size, the other its vocabulary, since both at once would take gigabytes. Where the
    kernels process several rows at a time, the number of rows makes chunks of unequal size.

    Args:
        tolerance: relative, of the loss and of the gradients' norm

    Raises:
        UserError: a trial made the device unusable
    """
    shapes = dict.fromkeys(((hidden_size, min(vocabulary, WORDS)), (min(hidden_size, WIDTH), vocabulary)))
    return next(filter(None, (_why_not(*shape, device, dtype, tolerance) for shape in shapes)), "")


def _why_not(hidden_size: int, words: int, device: torch.device, dtype: torch.dtype, tolerance: float) -> str:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, hidden_size, generator=draw).to(device, dtype)
    head = (torch.randn(words, hidden_size, generator=draw) * hidden_size**-0.5).to(device, dtype)
    labels = torch.randint(words, (ROWS,), generator=draw).to(device)
    try:
        found = _with_gradients(liger_cross_entropy, hidden, head, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels report errors asynchronously
    except ImportError as error:
        if find_spec("liger_kernel") is None:
            return f"{PACKAGE} is not installed here (pip install {PACKAGE})"
        return f"{PACKAGE} cannot be imported here: {error}"
    except torch.AcceleratorError as error:  # this process cannot use the device any more
        raise UserError(f"{PACKAGE} fails on this device ({error}); run again with backbone.loss=chunked") from error
    except Exception as error:  # of any kind (compiler, driver, another Triton); training goes on
        return f"{PACKAGE} fails here: {type(error).__name__}: {error}"
    expected = _with_gradients(summed_cross_entropy, hidden, head, labels)
    for name, one, other in zip(("loss", "hidden gradient", "head gradient"), found, expected, strict=True):
        off = float((one - other).norm() / other.norm())
        if not off <= tolerance:
            return f"{PACKAGE}: its {name} is {off:.2g} off"
    return ""


def _with_gradients(
    cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, head: Tensor, labels: Tensor
) -> list[Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    with torch.enable_grad():
        loss = cross_entropy(hidden, head, labels)
        gradients = torch.autograd.grad(loss, (hidden, head), loss.new_tensor(SHARE))
    return [loss.detach().float(), *(gradient.float() for gradient in gradients)]
