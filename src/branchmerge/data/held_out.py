"""Trajectories of each domain that no branch of a study trains on; the same ones in every branch."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from branchmerge.config import SourceConfig, TrainConfig
from branchmerge.data.template import Document, tokenise
from branchmerge.errors import UserError
from branchmerge.trajectories import sources
from branchmerge.trajectories.schema import Message, Trajectory
from branchmerge.trajectories.selection import select

if TYPE_CHECKING:  # the import takes a second, and counting rows does not need it
    from transformers import PreTrainedTokenizerBase


@dataclass
class HeldOut:
    """The held-out trajectories of a study."""

    documents: dict[str, list[Document]] = field(default_factory=dict)
    """Documents to validate on, by part of the corpus"""
    prompts: set[tuple[str, ...]] = field(default_factory=set)
    """Their normalised prompts (`_asked`); other answers to the same prompts are not trained on either."""

    def removed_from(self, rows: Sequence[Trajectory]) -> list[Trajectory]:
        """The rows that may be trained on."""
        if not self.prompts:
            return list(rows)
        return [row for row in rows if _asked(row.prompt) not in self.prompts]


def other_sources(config: TrainConfig) -> dict[str, SourceConfig]:
    """Sources of the study's experts that the branch itself does not train on."""
    return sources.of_parts(config, [part for part in config.study.experts if part not in config.domain.parts])


def identity(config: TrainConfig) -> dict[str, Any]:
    """The part of a branch's data description that concerns held-out rows; empty if none are held out."""
    if not config.data.validation_rows:
        return {}
    others = {part: {**sources.described(source), "path": ""} for part, source in other_sources(config).items()}
    return {"validation_rows": config.data.validation_rows, "held_out_of_others": others}


def check_count(config: TrainConfig, own: Mapping[str, list[Trajectory]]) -> None:
    """Refuse a `data.validation_rows` that exceeds the number of different prompts, before any row is graded.

    Args:
        own: as for `hold_out`
    """
    wanted = config.data.validation_rows
    if not wanted:
        return
    for part, rows in _parts(config, own).items():
        prompts = len({_asked(row.prompt) for row in rows})
        if prompts < wanted:
            raise _too_few(wanted, len(rows), part, prompts)


def hold_out(
    config: TrainConfig,
    own: Mapping[str, list[Trajectory]],
    tokenizer: "PreTrainedTokenizerBase",
    longest: int,
) -> HeldOut:
    """Choose `data.validation_rows` trajectories of every part.

    Args:
        own: the rows of the branch itself, by part.
        longest: tokens of the longest document that may be chosen.
    """
    held_out = HeldOut()
    if not config.data.validation_rows:
        return held_out
    for part, rows in _parts(config, own).items():
        chosen = _choose(config, part, rows, tokenizer, longest)
        held_out.documents[part] = [document for _, document in chosen]
        held_out.prompts |= {_asked(row.prompt) for row, _ in chosen}
    return held_out


def _parts(config: TrainConfig, own: Mapping[str, list[Trajectory]]) -> dict[str, list[Trajectory]]:
    """All rows to choose from, by part: the branch's own, and those of the other experts."""
    return {**own, **{part: sources.read(source) for part, source in other_sources(config).items()}}


def _choose(
    config: TrainConfig,
    part: str,
    rows: Sequence[Trajectory],
    tokenizer: "PreTrainedTokenizerBase",
    longest: int,
) -> list[tuple[Trajectory, Document]]:
    """The first rows, ordered by their prompts' hashes, that are correct, short enough and of different prompts."""
    wanted = config.data.validation_rows
    ordered = sorted(rows, key=lambda row: _digest(row.prompt))
    by_prompt: dict[tuple[str, ...], Trajectory] = {}
    for row in ordered:
        by_prompt.setdefault(_asked(row.prompt), row)
    candidates = list(by_prompt.values())
    chosen: list[tuple[Trajectory, Document]] = []
    for start in range(0, len(candidates), wanted):
        # Graded a few at a time, since most rows of another domain are not needed.
        right = select(candidates[start : start + wanted], config.data.verify, progress=False).rows
        documents = zip(right, tokenise(tokenizer, right), strict=True)
        chosen += [(row, document) for row, document in documents if len(document) <= longest and not document.flaw]
        if len(chosen) >= wanted:
            return chosen[:wanted]
    raise _too_few(wanted, len(rows), part, len(chosen))


def _asked(prompt: Sequence[Message]) -> tuple[str, ...]:
    """A prompt without differences between copies: white space, and the Unicode composition of accented characters."""
    texts = (unicodedata.normalize("NFC", message.content) for message in prompt)
    return tuple(f"{message.role} {' '.join(text.split())}" for message, text in zip(prompt, texts, strict=True))


def _digest(prompt: Sequence[Message]) -> bytes:
    """Hash of the prompt, not of the id, which may come from the name of a file."""
    text = json.dumps([message.as_dict() for message in prompt])
    return hashlib.sha256(text.encode()).digest()


def _too_few(wanted: int, rows: int, part: str, found: int) -> UserError:
    return UserError(
        f"data.validation_rows={wanted}: of {rows} rows of {part} only {found} can be held out; lower it, or check that"
        " data"
    )
