"""Cross-entropy of an output head without the logits of all tokens at once.

Logits of 16,384 tokens by 151,936 words are 10 GB in float32, and their gradient as much again. Here a chunk of rows at
a time goes through the head, and since the loss is a sum, its gradient is known there and then: nothing is computed
twice, and what stays are the gradients of the hidden states and of the head.

Shapes: N rows, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from branchmerge.student.autocast import compute_dtype

CHUNK, DEVICE_CHUNK = 1 << 24, 1 << 27
"""Logits that are held at once, in float32: 64 MB on a CPU, half a gigabyte elsewhere, which keeps a GPU busy."""


def summed_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of -log softmax(hidden head^T)[label].

    Products are in the dtype of autocast, or else of `hidden`; softmax, sums and the head's gradient in float32.

    Args:
        hidden: [N, H]
        head: [V, H], the weight of the output layer, which has no bias
        labels: int64 [N]

    Returns:
        float32, a scalar
    """
    held = CHUNK if hidden.device.type == "cpu" else DEVICE_CHUNK
    rows = max(1, held // len(head))
    loss: Tensor = _SummedCrossEntropy.apply(hidden, head, labels, rows, compute_dtype(hidden))
    return loss


class _SummedCrossEntropy(Function):
    """Its gradients are computed on the way forward, where they are wanted."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        of_hidden, of_head = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if of_head else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(dtype)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                x, y = hidden[part].to(dtype), labels[part, None]
                logits = (x @ weight.T).float()
                norm = logits.logsumexp(dim=-1, keepdim=True)
                loss += (norm - logits.gather(1, y)).sum()
                # d loss / d logits = softmax - one-hot of the label
                d = logits.sub_(norm).exp_()
                d.scatter_add_(1, y, torch.full_like(y, -1, dtype=d.dtype))
                d = d.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = d @ weight
                if grad_head is not None:
                    grad_head += d.T @ x
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        of_hidden, of_head = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return of_hidden, of_head, None, None, None
