"""A conversation as token ids, by a checkpoint's own tokenizer and chat template, as in training."""

from pathlib import Path

from branchmerge.data.template import opening, render_prompt
from branchmerge.errors import UserError
from branchmerge.evaluation.requests import Messages
from branchmerge.student.backbone import check_tokenizer, load_tokenizer


class Encoder:
    """A checkpoint's tokenizer; raises UserError where it cannot render a conversation or end an answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        check_tokenizer(self.tokenizer, folder)

    def ids(self, messages: Messages) -> list[int]:
        """Token ids of the prompt, exactly as the template renders it."""
        return list(self.tokenizer(self._prompt(messages), add_special_tokens=False)["input_ids"])

    def opening(self, messages: Messages) -> str:
        """What the template opened for the response: a <think>, or nothing. It is stored in front of the response, as
        one that was cut off while it still reasoned would otherwise look like one without reasoning."""
        return opening(self._prompt(messages))

    def _prompt(self, messages: Messages) -> str:
        try:
            return render_prompt(self.tokenizer, messages)
        except Exception as error:  # a template may compute, and so fail, in any way
            roles = ", ".join(message.role for message in messages)
            raise UserError(
                f"{self.folder}: its chat template cannot write a question (turns: {roles};"
                f" {type(error).__name__}: {error}); mend the template, or take another model or prompt_style"
            ) from error
