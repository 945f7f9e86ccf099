"""Turn a trajectory into token ids with the backbone's own chat template.

    |---------------- prompt, not learned ----------------|------------- response, learned -------------|
    <|im_start|>user\\nWhat is 12 x 7?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n...\\boxed{84}<|im_end|>

The response is appended to the rendered prompt rather than rendered as a turn: templates of reasoning models cut the
<think> part out of assistant turns (R1-Distill's does), which would drop the very thing to be learned. Prompt and
response are tokenised apart, as they are at generation time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from branchmerge.errors import UserError
from branchmerge.trajectories.schema import Message, Trajectory

PREFILL = "<think>\n"


@dataclass(frozen=True)
class Document:
    """A tokenised trajectory; the first `prompt_len` tokens are context, the others are learned."""

    id: str
    tokens: tuple[int, ...]
    prompt_len: int

    def __len__(self) -> int:
        return len(self.tokens)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> str:
    """The text the student continues: the conversation so far and the opening of the assistant's turn."""
    conversation = [message.as_dict() for message in prompt]
    return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))


def tokenise(tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory) -> Document:
    """Token ids of one trajectory, ended by the end-of-sequence token.

    Raises:
        UserError: the template refuses the conversation, or the text is none; it names the trajectory
    """
    try:
        return _tokenise(tokenizer, trajectory)
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"{trajectory.id}: cannot be written by the backbone's chat template and tokenizer ({error}); mend or drop"
            " that row, or take another backbone"
        ) from error


def _tokenise(tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory) -> Document:
    prompt = render_prompt(tokenizer, trajectory.prompt)
    response = trajectory.response
    if prompt.endswith(PREFILL):
        # The template has opened the reasoning already.
        response = response.removeprefix(PREFILL)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return Document(trajectory.id, (*prompt_ids, *response_ids, tokenizer.eos_token_id), len(prompt_ids))
