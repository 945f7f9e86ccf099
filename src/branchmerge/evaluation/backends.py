"""What generates: a checkpoint as an lm-eval model."""

from pathlib import Path

from lm_eval.api.model import LM

from branchmerge import machine
from branchmerge.config import BackendConfig


def dtype_of(backend: BackendConfig) -> str:
    """float32 or bfloat16; `auto` takes bfloat16 where the device is faster at it."""
    if backend.dtype != "auto":
        return backend.dtype
    return "bfloat16" if machine.computes_bf16(machine.device_of(backend.device)) else "float32"


def load(backend: BackendConfig, folder: Path) -> LM:
    """Load a checkpoint into transformers, ready to generate."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder),
        dtype=dtype_of(backend),
        device=str(machine.device_of(backend.device)),
        batch_size=backend.batch_size,
    )
