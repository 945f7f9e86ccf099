"""What a model is asked and what it answered: the types passed between tasks, backends and the sample store."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from branchmerge.errors import UserError
from branchmerge.trajectories.schema import Message

Messages = tuple[Message, ...]

KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_tokens", "max_new_tokens"}
"""Keys of an lm-eval task's generation_kwargs"""


@dataclass(frozen=True)
class Sampling:
    """How a response is drawn. Of a model's own generation config only the end tokens are used."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: the most likely token"""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens"""
    until: tuple[str, ...] = ()
    """Stop strings, besides the model's own end tokens; the response ends before them"""

    @staticmethod
    def parse(task: str, given: Mapping[str, Any]) -> "Sampling":
        """Read a task's generation_kwargs; raises UserError on a key that would be ignored."""
        unknown = sorted(set(given) - KNOWN)
        if unknown:
            raise UserError(f"{task}: generation_kwargs has {unknown[0]}={given[unknown[0]]}, which no backend applies")
        sampled = bool(given.get("do_sample", given.get("temperature", 0) > 0))
        until = given.get("until") or ()
        return Sampling(
            max_new_tokens=int(
                given.get("max_gen_toks") or given.get("max_new_tokens") or given.get("max_tokens") or 256
            ),
            temperature=float(given.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(given.get("top_p", 1.0)) if sampled else 1.0,
            top_k=max(int(given.get("top_k", 0)), 0) if sampled else 0,
            until=(until,) if isinstance(until, str) else tuple(until),
        )


@dataclass(frozen=True)
class Request:
    """One sample of one question."""

    task: str
    question: str
    """Id of the question"""
    sample: int
    """0 to k - 1"""
    messages: Messages
    sampling: Sampling
    seed: int

    def key(self, facts: Mapping[str, Any]) -> str:
        """Fingerprint of everything that the response depends on; `facts` has the model, backend and task version."""
        said = {"facts": facts, **asdict(self)}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Response:
    """What the model answered. Where the template opened the reasoning, the text begins with that <think>."""

    text: str
    tokens: int
    """Generated tokens, including the one that ended it"""
    finish: str
    """stop; or length, where it was cut off"""


def seed_of(base: int, task: str, question: str, sample: int) -> int:
    """A seed for each sample, independent of order and batch; 31 bits, which every server accepts."""
    digest = hashlib.sha256(f"{base}/{task}/{question}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def requests_for(
    task: str, questions: Sequence[tuple[str, Messages]], samples: int, sampling: Sampling, seed: int
) -> list[Request]:
    """`samples` requests a question, question by question."""
    return [
        Request(task, question, number, messages, sampling, seed_of(seed, task, question, number))
        for question, messages in questions
        for number in range(samples)
    ]
