"""The dtype to compute in under autocast, for operations that autocast does not handle."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """autocast's dtype while it is on (as rotary embeddings return float32 under it), else the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
