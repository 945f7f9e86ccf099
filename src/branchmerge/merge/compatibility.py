"""Refuse models that cannot be merged, from their configs and headers alone, before any weight is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from branchmerge.errors import UserError
from branchmerge.merge.checkpoint import Reader

ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


def check(readers: Mapping[str, Reader]) -> None:
    """Compare all models with the first; raises UserError that names both and says what differs."""
    (first, reference), *others = readers.items()
    for name, reader in others:
        _check_config(first, reference.folder, name, reader.folder)
        _check_vocabulary(first, reference.folder, name, reader.folder)
        _check_tensors(first, reference, name, reader)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: not JSON ({error}); copy or download it again") from error
    return config


def _check_config(first: str, first_folder: Path, name: str, folder: Path) -> None:
    a, b = _config(first_folder), _config(folder)
    for key in ARCHITECTURE:
        if a.get(key) != b.get(key):
            raise UserError(
                f"{first} and {name} cannot be merged: their architectures differ ({key} {a.get(key)} and {b.get(key)})"
                "; merge fine-tunes of one backbone"
            )
    if a.get("vocab_size") != b.get("vocab_size"):
        raise UserError(
            f"{first} and {name} cannot be merged: their vocabularies have {a.get('vocab_size')} and"
            f" {b.get('vocab_size')} entries; merge fine-tunes of one backbone"
        )


def _check_vocabulary(first: str, first_folder: Path, name: str, folder: Path) -> None:
    """The same id must be the same token; only looked into where the tokenizer files differ."""
    a, b = first_folder / "tokenizer.json", folder / "tokenizer.json"
    if not (a.is_file() and b.is_file()) or a.read_bytes() == b.read_bytes():
        return
    vocabularies = [_vocabulary(path) for path in (a, b)]
    if vocabularies[0] != vocabularies[1]:
        differing = sorted(vocabularies[0].items() ^ vocabularies[1].items(), key=lambda item: (item[1], item[0]))
        token, number = differing[0]
        raise UserError(
            f"{first} and {name} cannot be merged: their vocabularies differ"
            f" (token {token!r} has id {number} in one only); merge fine-tunes of one backbone"
        )


def _vocabulary(path: Path) -> dict[str, int]:
    raw = json.loads(path.read_text())
    vocabulary = raw["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # unigram models list (token, score)
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return {**vocabulary, **{entry["content"]: entry["id"] for entry in raw.get("added_tokens", [])}}


def _check_tensors(first: str, reference: Reader, name: str, reader: Reader) -> None:
    missing = sorted(set(reference.tensors) ^ set(reader.tensors))
    if missing:
        where = first if missing[0] in reference.tensors else name
        raise UserError(f"{first} and {name} cannot be merged: the tensor {missing[0]} is in {where} only")
    for tensor, info in reference.tensors.items():
        shape = reader.tensors[tensor].shape
        if shape != info.shape:
            raise UserError(
                f"{first} and {name} cannot be merged: {tensor} has the shapes {list(info.shape)} and {list(shape)}"
            )
