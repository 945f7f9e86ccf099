"""The cross-entropy of chunked_loss.py by liger-kernel's fused Triton kernel: an optional way on CUDA.

Source: Liger Kernel (arXiv 2410.10989). Shapes: N rows, H hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from branchmerge.student.autocast import compute_dtype
from branchmerge.student.chunked_loss import summed_cross_entropy

PACKAGE = "liger-kernel"


def liger_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """As `summed_cross_entropy`; the head's gradient is summed in float32, too."""
    if not len(hidden):  # which its kernel divides by
        return summed_cross_entropy(hidden, head, labels)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = liger_fused_linear_cross_entropy(
            hidden.to(dtype), head.to(dtype), labels, reduction="sum", accum_dtype=torch.float32
        )
    return loss.float()


def why_not(hidden_size: int, vocabulary: int, device: torch.device, dtype: torch.dtype, tolerance: float) -> str:
    """Why the kernel cannot be used here, by a trial against `summed_cross_entropy`; empty where it can.

    Args:
        tolerance: relative, of the loss and of the gradients' norm
    """
    draw = torch.Generator().manual_seed(0)
    rows, words = 64, min(vocabulary, 4096)
    hidden = torch.randn(rows, hidden_size, generator=draw).to(device, dtype)
    head = (torch.randn(words, hidden_size, generator=draw) * hidden_size**-0.5).to(device, dtype)
    labels = torch.randint(words, (rows,), generator=draw).to(device)
    try:
        found = _with_gradients(liger_cross_entropy, hidden, head, labels)
    except ImportError:
        return f"{PACKAGE} is not installed here (pip install {PACKAGE})"
    except Exception as error:  # a compiler, a driver, another version of Triton: whatever it is, training goes on
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
        gradients = torch.autograd.grad(loss, (hidden, head))
    return [loss.detach().float(), *(gradient.float() for gradient in gradients)]
