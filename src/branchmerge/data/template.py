"""Turn a trajectory into token ids with the backbone's own chat template.

    |---------------- prompt, not learned ----------------|------------- response, learned -------------|
    <|im_start|>user\\nWhat is 12 x 7?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n...\\boxed{84}<|im_end|>

The response is appended to the rendered prompt rather than rendered as a turn: templates of reasoning models remove the
<think> part of assistant turns (R1-Distill's does), the very part to be learned. Prompt and response are tokenised
separately, as in generation.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from branchmerge.errors import UserError
from branchmerge.trajectories.schema import Message, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<think>", "</think>"
OPENED = re.compile(r"<think>\s*$")
"""Matches at the end of a prompt whose template opens the reasoning"""
NO_REASONING = "\n</think>\n\n"
"""Closes the reasoning at once, for a response without any"""
TODAY = date(2024, 7, 26)
"""For templates that print the date (Llama 3's default), so that the same configuration always gives the same tokens"""
PART = 256
"""Trajectories tokenised in one call, which uses all cores"""


@dataclass(frozen=True, eq=False)
class Document:
    """A tokenised trajectory; the first `prompt_len` tokens are context, the others are learned."""

    id: str
    tokens: NDArray[np.integer]
    """An array, as a study has hundreds of millions of tokens, and Python's integers take ten times as much memory."""
    prompt_len: int
    framed: bool = False
    """Whether a text in it contains a special token of the template's turns, as a text about chat templates may"""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ends_early(self) -> bool:
        """Whether the end-of-sequence token, its last one, also occurs earlier among the learned tokens."""
        return bool((self.tokens[self.prompt_len : -1] == self.tokens[-1]).any())

    @property
    def flaw(self) -> str:
        """Why the document must not be trained on; empty if it may be."""
        if self.ends_early:
            return "ends_early"
        if self.framed:
            return "control_token"
        return "empty" if len(self) == self.prompt_len + 1 else ""


def render_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message]) -> str:
    """The text that the student continues: the conversation so far, and the beginning of the assistant's turn."""
    conversation = [message.as_dict() for message in prompt]
    return str(
        tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False, strftime_now=TODAY.strftime
        )
    )


def opening(prompt: str) -> str:
    """The end of a rendered prompt that opens the reasoning: <think> and the white space after it; else empty."""
    found = OPENED.search(prompt)
    return found[0] if found else ""


def tokenise(tokenizer: "PreTrainedTokenizerBase", trajectories: Sequence[Trajectory]) -> Iterator[Document]:
    """Tokenise each trajectory, followed by the end-of-sequence token.

    Raises:
        UserError: the template refuses a conversation, or a text is not valid; it names the trajectory
    """
    for start in range(0, len(trajectories), PART):
        part = trajectories[start : start + PART]
        try:
            yield from _tokenise(tokenizer, part)
        except MemoryError:
            raise
        except Exception:  # templates are programs, and may raise any error
            for trajectory in part:  # find the one that fails
                _check(tokenizer, trajectory)
            raise


def _tokenise(tokenizer: "PreTrainedTokenizerBase", trajectories: Sequence[Trajectory]) -> list[Document]:
    rendered = [_render(tokenizer, trajectory) for trajectory in trajectories]
    frame = _frame(tokenizer)
    framed = [
        any(frame.search(text) for text in (*(message.content for message in trajectory.prompt), response))
        for trajectory, (_, response) in zip(trajectories, rendered, strict=True)
    ]
    prompts = _ids(tokenizer, [prompt for prompt, _ in rendered])
    responses = _ids(tokenizer, [response for _, response in rendered])
    names = [trajectory.id for trajectory in trajectories]
    return [
        Document(name, np.array([*prompt, *response, tokenizer.eos_token_id], dtype=np.int32), len(prompt), marked)
        for name, prompt, response, marked in zip(names, prompts, responses, framed, strict=True)
    ]


def _render(tokenizer: "PreTrainedTokenizerBase", trajectory: Trajectory) -> tuple[str, str]:
    """Prompt and response as text, with a single <think> between them, and without the end-of-sequence token."""
    prompt = render_prompt(tokenizer, trajectory.prompt)
    response = trajectory.response
    if response.rstrip().endswith(tokenizer.eos_token):  # templates write it, some with a line break
        response = response.rstrip().removesuffix(tokenizer.eos_token)
    opened = opening(prompt)
    if not opened:
        return prompt, response
    if response.lstrip().startswith(OPEN):
        response = response.lstrip().removeprefix(OPEN).removeprefix(opened.removeprefix(OPEN))
    elif CLOSE not in response:
        response = NO_REASONING + response
    return prompt, response


def _frame(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches the special tokens that delimit turns and texts: in a row's own text, one would begin or end a turn.

    Other special tokens are allowed: rows may contain some on purpose, such as those for tools.
    """
    around = render_prompt(tokenizer, [Message("user", "?")])
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    marks = {*(mark for mark in special if mark in around), *filter(None, named)} - {OPEN, CLOSE}
    return re.compile("|".join(map(re.escape, sorted(marks))))


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # Set explicitly, or tokenizers warns when a process is forked later; no forked process of this project tokenises.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


def check_prompts(tokenizer: "PreTrainedTokenizerBase", trajectories: Sequence[Trajectory]) -> None:
    """Raise a UserError that names the trajectory if the chat template refuses a prompt, such as a system prompt."""
    for trajectory in trajectories:
        with _named(trajectory):
            render_prompt(tokenizer, trajectory.prompt)


def _check(tokenizer: "PreTrainedTokenizerBase", trajectory: Trajectory) -> None:
    with _named(trajectory):
        _tokenise(tokenizer, [trajectory])


@contextmanager
def _named(trajectory: Trajectory) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # templates are programs, and may raise any error
        raise UserError(
            f"{trajectory.id}: cannot be written by the backbone's chat template and tokenizer"
            f" ({type(error).__name__}: {error}); mend or drop that row, or take another backbone"
        ) from error
