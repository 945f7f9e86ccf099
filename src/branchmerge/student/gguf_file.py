"""Turn a GGUF file into a plain checkpoint, by transformers' own loader."""

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
    """Dequantise it into safetensors, tokenizer and chat template."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with read_once():
        config = AutoConfig.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # A model that came from GGUF refuses to be saved: a fresh one of the same shape takes its weights over.
    del loaded.config.quantization_config
    with torch.device("meta"):
        fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shape = read_config(out)  # with the name that transformers 4 knows it by
    write_json(out / "config.json", {**shape, "rope_theta": shape["rope_parameters"]["rope_theta"]})


@contextmanager
def read_once() -> Iterator[None]:
    """While it is held, transformers reads a GGUF file once and fast, and makes a table of weights' names once.

    It reads the whole file anew for config, weights and tokenizer, and makes the same table for every module: for a
    model of 135M parameters two thirds of 20 s.
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
    """A reader whose slices are plain arrays: numpy.memmap's, of which it makes a million, take four times as long."""

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        """The file's bytes."""
        return self._plain

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._plain = mapped.view(np.ndarray)
