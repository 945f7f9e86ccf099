"""What generates: a checkpoint as an lm-eval model."""

from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from branchmerge import machine
from branchmerge.config import BackendConfig
from branchmerge.data.template import PREFILL
from branchmerge.evaluation.decode_attention import DECODE_SDPA


class Transformers(HFLM):
    """lm-eval's transformers model, given exactly the prompts of training.

    No token is put in front of what the chat template rendered. Responses begin with the <think> that the template
    opened: without it one that was cut off while it still reasoned would look like one without reasoning.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(add_bos_token=False, **settings)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        responses = super().generate_until(requests, disable_tqdm=disable_tqdm)
        opened = (PREFILL if request.args[0].endswith(PREFILL) else "" for request in requests)
        return [opening + response for opening, response in zip(opened, responses, strict=True)]


def dtype_of(backend: BackendConfig) -> str:
    """float32 or bfloat16; `auto` takes bfloat16 where the device is faster at it."""
    if backend.dtype != "auto":
        return backend.dtype
    return "bfloat16" if machine.computes_bf16(machine.device_of(backend.device)) else "float32"


def load(backend: BackendConfig, folder: Path) -> Transformers:
    """Load a checkpoint into transformers, ready to generate."""
    device = machine.device_of(backend.device)
    attention = {"attn_implementation": DECODE_SDPA} if device.type == "cpu" else {}
    path = str(folder.resolve())  # absolute, because lm-eval would look a path like `a/b` up on the hub
    return Transformers(
        pretrained=path,
        dtype=dtype_of(backend),
        device=str(device),
        batch_size=backend.batch_size,
        **attention,
    )
