"""Cross-entropy of an output head without the logits of all tokens at once.

Logits of 16,384 tokens by 151,936 words are 10 GB in float32, and their gradient as much again. Here one chunk of rows
at a time goes through the head. Since the loss is a sum, the gradient of a chunk is computed right away: nothing is
computed twice, and only the gradients of the hidden states and of the head are kept.

Shapes: N rows, H hidden size, V vocabulary.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from branchmerge.student.autocast import compute_dtype

CHUNK, DEVICE_CHUNK, COMPILED_CHUNK = 1 << 26, 1 << 27, 1 << 29
"""Logits of a chunk: on a CPU; on other devices, where they take a gigabyte in bfloat16, in float32 and as a gradient
together; there when compiled, where the gradient overwrites them and they take as much. Larger chunks are fewer passes
over the head's gradient."""


def summed_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, compiled: bool = False) -> Tensor:
    """Sum over rows of -log softmax(hidden head^T)[label].

    Products are in the dtype of autocast, or else of `hidden`; softmax, sums and the head's gradient in float32.

    Args:
        hidden: [N, H]
        head: [V, H], the weight of the output layer, which has no bias
        labels: int64 [N]
        compiled: what follows the logits is compiled by torch.compile: few passes over them, the gradient in place.

    Returns:
        float32, a scalar
    """
    held = CHUNK if hidden.device.type == "cpu" else COMPILED_CHUNK if compiled else DEVICE_CHUNK
    rows = max(1, held // len(head))
    loss: Tensor = _SummedCrossEntropy.apply(hidden, head, labels, rows, compute_dtype(hidden), compiled)
    return loss


class _SummedCrossEntropy(Function):
    """Computes the gradients that are needed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, rows: int, dtype: torch.dtype, compiled: bool
    ) -> Tensor:
        of_chunk = _by_compiled if compiled else _loss_and_gradient
        of_hidden, of_head = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if of_head else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(dtype)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                x, y = hidden[part].to(dtype), labels[part, None]
                part_loss, d = of_chunk(x @ weight.T, y)
                loss += part_loss
                if grad_hidden is not None:
                    grad_hidden[part] = d @ weight
                if grad_head is not None:
                    _add_product(grad_head, d.T, x)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_head = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return of_hidden, of_head, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, by one product that accumulates in float32 where the device's library has one, not in two passes.

    Args:
        total: float32 [V, H]; a: [V, rows], b: [rows, H]
    """
    if total.is_cuda and not torch.version.hip and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk, and d loss / d logits = softmax - one-hot of the label; in place where possible.

    Args:
        logits: [rows, V] in the dtype of the products, which is also the gradient's
        labels: int64 [rows, 1]
    """
    dtype, logits = logits.dtype, logits.float()
    of_label = logits.gather(1, labels)
    top = logits.amax(dim=-1, keepdim=True)
    exponentials = logits.sub_(top).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    loss = (top + total.log() - of_label).sum()
    gradient = exponentials.div_(total)
    gradient.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=gradient.dtype))
    return loss, gradient.to(dtype)


def _to_be_compiled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`_loss_and_gradient` for torch.compile: in place, and without scatter, which would be a separate pass."""
    values = logits.float()
    norm = values.logsumexp(dim=-1, keepdim=True)
    loss = (norm - values.gather(1, labels)).sum()
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels
    return loss, logits.copy_((values - norm).exp() - is_label.float())


def _by_compiled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compiled once for any number of rows but a fixed vocabulary: kernels that divide by a dynamic size are slow."""
    for tensor in (logits, labels):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    loss, gradient = _compiled()(logits, labels)
    return loss, gradient


@cache
def _compiled() -> Any:
    return torch.compile(_to_be_compiled)
