"""Convert a GGUF file to a Hugging Face checkpoint, by transformers' own loader."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from branchmerge.files import write_json
from branchmerge.student.backbone import read_config


def convert(file: Path, out: Path) -> None:
    """Write the dequantised weights as safetensors, the config, tokenizer and chat template into `out`."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with read_once():
        config = AutoConfig.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers refuses to save a model loaded from GGUF; a fresh one of the same shape takes over its weights.
    del loaded.config.quantization_config
    with torch.device("meta"):
        fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shape = read_config(out)  # rope_theta under the name that transformers 4 reads
    write_json(out / "config.json", {**shape, "rope_theta": shape["rope_parameters"]["rope_theta"]})


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, transformers reads a GGUF file only once, and faster, and builds the table of weights' names only once.

    Otherwise it reads the whole file for each of config, weights and tokenizer, and builds the same table for every
    module: two thirds of 20 s for a model of 135M parameters.
    """
    usual = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    quick = {
        "GGUFReader": functools.cache(PlainReader),
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    try:
        vars(gguf).update(quick)
        yield
    finally:
        vars(gguf).update(usual)


class PlainReader(gguf.GGUFReader):
    """A reader that slices a plain array: slices of numpy.memmap, a million of them, take four times as long."""

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        """The file's bytes."""
        return self._plain

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._plain = mapped.view(np.ndarray)
