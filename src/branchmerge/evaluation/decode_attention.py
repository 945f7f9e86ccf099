"""Attention for generating on a CPU: torch's SDPA kernel, but plain matrix products for single new tokens.

With one query a row and a padding mask, the CPU kernel of SDPA takes as long as all matrix products of a 135M model
together; the products below, which also leave grouped keys and values unexpanded, take a fraction of that.

Shapes: B batch, H heads, G key/value heads, T tokens so far, E head size of queries and keys, F of values.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DECODE_SDPA = "decode_sdpa"


def decode_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Attention in the form transformers calls.

    Args:
        query: [B, H, 1 or more, E]; key: [B, G, T, E]; value: [B, G, T, F].
        attention_mask: True where a token is seen, or what is added to the scores, as some models make it themselves.

    Returns:
        [B, 1 or more, H, F]
    """
    if query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    B, H, _, E = query.shape
    G = key.shape[1]
    scaling = kwargs.get("scaling") or E**-0.5
    scores = (query.view(B, G, H // G, E) * scaling) @ key.transpose(2, 3)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + _grouped(attention_mask, G)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(B, 1, H, -1), None


def _grouped(mask: Tensor, groups: int) -> Tensor:
    """[B, 1 or H, 1, T] -> [B, 1 or G, 1 or H / G, T], as scores are."""
    return mask if mask.shape[1] == 1 else mask.unflatten(1, (groups, -1)).squeeze(3)


AttentionInterface.register(DECODE_SDPA, decode_sdpa)
AttentionMaskInterface.register(DECODE_SDPA, sdpa_mask)
