"""What a tensor is computed with where autocast decides that, for operations that autocast does not know."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """autocast's dtype while it is on (rotary embeddings leave float32 there), else the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
