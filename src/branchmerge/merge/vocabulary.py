"""One vocabulary for all models: refuse others (vocab=same), pad (vocab=pad) or cut (vocab=intersect).

    rows of the embedding          vocab=pad                          vocab=intersect
    A  a0 a1 a2                    a0 a1 a2 b3                        a0 a1 a2
    B  b0 b1 b2 b3                 b0 b1 b2 b3                        b0 b1 b2

Padding and cutting require that an id known to two models is the same token in both. A row beyond a tokenizer's last
token is padding: where another model has a token there, that model's row is taken.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from branchmerge.errors import UserError
from branchmerge.merge.arrays import Array, converted, is_floating
from branchmerge.merge.checkpoint import TensorInfo
from branchmerge.merge.scan import check_finite
from branchmerge.merge.views import Source, View
from branchmerge.student.backbone import read_config

WAYS = ("same", "pad", "intersect")
OF_TOKENS = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|lm_head|embed_out|output)\.(?:weight|bias)$"
)
"""Tensors with one row per token."""
KEYS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json about the vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a checkpoint."""

    name: str
    folder: Path
    rows: int | None
    """Rows of the embedding, by its config."""
    tokens: Mapping[int, str] | None
    """Tokens by id; None if no tokenizer can be read."""

    @property
    def known(self) -> int:
        """Number of known ids; later rows are padding."""
        return max(self.tokens or {}, default=-1) + 1


def vocabulary_of(name: str, folder: Path) -> Vocabulary:
    return Vocabulary(name, folder, _part(read_config(folder)).get("vocab_size"), _tokens(folder))


def check_same(first: str, a: Path, name: str, b: Path) -> None:
    """Refuse two models whose vocabularies differ; says how, and which `vocab` would merge them."""
    rows = [_part(read_config(folder)).get("vocab_size") for folder in (a, b)]
    if rows[0] == rows[1] and _same_file(a / "tokenizer.json", b / "tokenizer.json"):
        return  # equal files, so the large tables need not be read
    one, other = vocabulary_of(first, a), vocabulary_of(name, b)
    if one.rows != other.rows or (one.tokens is not None and other.tokens is not None and one.tokens != other.tokens):
        raise UserError(f"{first} and {name} cannot be merged: {_how_they_differ(one, other)}")


def unify(models: Mapping[str, Source], how: str) -> tuple[dict[str, Source], Path, int]:
    """Views of all models with one vocabulary, by `pad` or `intersect`; the folder of its tokenizer; and its size."""
    known = [_usable(vocabulary_of(name, model.folder), how) for name, model in models.items()]
    for one, other in combinations(known, 2):
        if _conflict(one, other):
            raise UserError(f"vocab={how}: {_how_they_differ(one, other)}")
    sizes = [vocabulary.known for vocabulary in known]
    if how == "pad":
        rows, chosen = max(_rows(v) for v in known), known[sizes.index(max(sizes))]
    else:
        # One tokenizer keeps its padding; with two, tokens that only one knows must not be generated.
        rows = min(sizes) if len(set(sizes)) > 1 else min(_rows(v) for v in known)
        chosen = known[sizes.index(min(sizes))]
    views: dict[str, Source] = {}
    for vocabulary in known:
        pieces = _pieces(vocabulary, known, rows)
        whole = rows == _rows(vocabulary) and all(piece.owner == vocabulary.name for piece in pieces)
        views[vocabulary.name] = models[vocabulary.name] if whole else _Resized(vocabulary, models, pieces)
    return views, chosen.folder, rows


def write_config(first: Path, tokenizer: Path, rows: int | None, out: Path) -> None:
    """Copy a model's config.json, with the keys about tokens from the folder `tokenizer` and the number of rows."""
    text = (first / "config.json").read_bytes()
    config, source = read_config(first), _part(read_config(tokenizer))
    told = {**{key: source[key] for key in KEYS if key in source}, **({"vocab_size": rows} if rows else {})}
    part = _part(config)
    if rows is not None and any(part.get(key) != value for key, value in told.items()):
        part |= told
        text = (json.dumps(config, indent=2) + "\n").encode()
    (out / "config.json").write_bytes(text)


@dataclass(frozen=True)
class _Piece:
    """Rows that a model takes from an owner: itself or another model."""

    start: int
    stop: int
    owner: str


class _Resized(View):
    """A model with other rows in the tensors that have one row per token."""

    def __init__(self, vocabulary: Vocabulary, models: Mapping[str, Source], pieces: Sequence[_Piece]) -> None:
        source = models[vocabulary.name]
        rows = pieces[-1].stop
        self._resized = {
            name
            for name, info in source.tensors.items()
            if OF_TOKENS.search(name) and info.shape[:1] == (vocabulary.rows,)
        }
        tensors = {
            name: TensorInfo(info.dtype, (rows, *info.shape[1:])) if name in self._resized else info
            for name, info in source.tensors.items()
        }
        super().__init__(source, tensors)
        self._models, self._pieces = models, pieces
        self._made: dict[str, Array] = {}

    def read(self, name: str) -> Array:
        tensor = self.source.read(name)
        if name not in self._resized:
            return tensor
        if all(self._models[piece.owner] is self.source for piece in self._pieces):
            return tensor[: self._pieces[-1].stop]
        if name not in self._made:
            self._made[name] = np.concatenate([self._piece(name, piece, tensor.dtype) for piece in self._pieces])
        return self._made[name]

    def _piece(self, name: str, piece: _Piece, dtype: np.dtype[Any]) -> Array:
        owner = self._models[piece.owner]
        rows = owner.read(name)[piece.start : piece.stop]
        if owner is not self.source and is_floating(dtype):
            check_finite(rows, name, owner.folder)
        return converted(rows, dtype)

    def release(self, name: str) -> None:
        self._made.pop(name, None)
        super().release(name)


def _pieces(model: Vocabulary, models: Sequence[Vocabulary], rows: int) -> list[_Piece]:
    """Where a model's rows come from: its own tokens, then the first model that knows the token, then padding."""
    cuts = sorted({0, rows, *(end for v in models for end in (v.known, _rows(v)) if end < rows)})
    pieces: list[_Piece] = []
    for start, stop in pairwise(cuts):
        knowing = [v for v in models if start < v.known]
        having = [v for v in models if start < _rows(v)]
        candidates = knowing or having
        owner = model if model in candidates else candidates[0]
        if pieces and pieces[-1].owner == owner.name:
            start = pieces.pop().start
        pieces.append(_Piece(start, stop, owner.name))
    return pieces


def _usable(vocabulary: Vocabulary, how: str) -> Vocabulary:
    """Refuse a vocabulary whose rows cannot be matched with others."""
    if vocabulary.tokens is None:
        raise UserError(
            f"vocab={how}: {vocabulary.folder} has no tokenizer.json, so nothing says which token a row belongs to;"
            " put the tokenizer of that model there"
        )
    if vocabulary.known > _rows(vocabulary):
        raise UserError(
            f"vocab={how}: the tokenizer of {vocabulary.folder} has {vocabulary.known} tokens, its model only"
            f" {vocabulary.rows}; they are of two models"
        )
    return vocabulary


def _rows(vocabulary: Vocabulary) -> int:
    if vocabulary.rows is None:
        raise UserError(f"{vocabulary.folder / 'config.json'}: has no vocab_size; add it, or leave vocab at same")
    return vocabulary.rows


def _how_they_differ(a: Vocabulary, b: Vocabulary) -> str:
    """In one line, with the remedies that make sense."""
    if a.tokens is None or b.tokens is None:
        return (
            f"their vocabularies have {a.rows} and {b.rows} entries, and without a tokenizer.json in both nothing says"
            " which are the same; merge fine-tunes of one backbone"
        )
    if a.tokens == b.tokens:
        if a.rows is None or b.rows is None:
            return f"config.json says vocab_size {a.rows} and {b.rows}; write the one that is missing"
        larger = a if a.rows > b.rows else b
        return (
            f"their tokenizers are the same, but the embedding of {larger.name} has {abs(a.rows - b.rows)} more rows"
            f" ({a.rows} and {b.rows}), which are padding; set vocab=pad to keep them or vocab=intersect to drop them"
        )
    only_a, only_b = (
        [i for i in sorted(x) if x[i] != y.get(i)] for x, y in ((a.tokens, b.tokens), (b.tokens, a.tokens))
    )
    counts = (
        f"{len(only_a)} of {len(a.tokens)} tokens are in {a.name} only, {len(only_b)} of {len(b.tokens)} in {b.name}"
    )
    conflict = _conflict(a, b)
    if conflict:
        return f"their vocabularies differ ({conflict}; {counts} only); merge fine-tunes of one backbone"
    number = min(only_a + only_b)
    token = a.tokens.get(number, b.tokens.get(number))
    return (
        f"their vocabularies differ ({counts} only; the first is {token!r} with id {number}), but ids that both know"
        " are the same tokens; set vocab=pad to keep all or vocab=intersect to keep those that all models know"
    )


def _conflict(a: Vocabulary, b: Vocabulary) -> str:
    """Where an id is another token in the two models, or a token has two ids; empty if nowhere."""
    assert a.tokens is not None and b.tokens is not None
    for number in sorted(a.tokens.keys() & b.tokens.keys()):
        if a.tokens[number] != b.tokens[number]:
            return f"id {number} is token {a.tokens[number]!r} in {a.name} and {b.tokens[number]!r} in {b.name}"
    ids = {token: number for number, token in b.tokens.items()}
    for number, token in sorted(a.tokens.items()):
        if ids.get(token, number) != number:
            return f"token {token!r} has id {number} in {a.name} and {ids[token]} in {b.name}"
    return ""


def _tokens(folder: Path) -> dict[int, str] | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        table = raw["model"].get("vocab", {})
        if isinstance(table, list):  # unigram models list (token, score)
            table = {entry[0]: number for number, entry in enumerate(table)}
        tokens = {number: token for token, number in table.items()}
        return tokens | {entry["id"]: entry["content"] for entry in raw.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(
            f"{path}: not a tokenizer ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def _part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config about the language model; multimodal models have a section for it."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "vocab_size" in inner else config


def _same_file(a: Path, b: Path) -> bool:
    if not (a.is_file() and b.is_file()):
        return True  # nothing to compare
    return a.read_bytes() == b.read_bytes()
