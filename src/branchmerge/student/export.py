"""Write a trained student as a Hugging Face checkpoint whose tokenizer is the backbone's, byte for byte."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def export(model: "PreTrainedModel", backbone: Path, out: Path, dtype: "torch.dtype") -> None:
    """Save the weights in `dtype`, with the backbone's tokenizer and chat template; converts `model` itself."""
    model.to(dtype=dtype)  # type: ignore[call-arg]  # transformers wraps `to` without its types
    model.save_pretrained(out)
    copy_tokenizer(backbone, out)


def copy_tokenizer(source: Path, out: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config byte for byte; returns the names of what was there."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, out / name)
    return names
