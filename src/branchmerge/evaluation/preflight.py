"""Checks before a model loads: it is complete, every prompt fits with its response, and the disk has room."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from branchmerge.errors import UserError
from branchmerge.evaluation.encoding import Encoder
from branchmerge.evaluation.requests import Request
from branchmerge.student import backbone

BYTES_A_TOKEN = 16
"""Bytes on the disk per token of a response, whose text is stored twice: as generated, and with its verdict"""


def check_loads(folder: Path) -> None:
    """Refuse a checkpoint that transformers would not load whole, by its config.json and the headers of its files.

    Raises:
        UserError: an unknown kind of model, or a weight that is missing or of another shape
    """
    from branchmerge.student.stored import check_stored, empty_model

    if "quantization_config" in backbone.read_config(folder):  # whose files hold codes
        return
    with backbone.loading(folder):
        model = empty_model(folder, None)
    check_stored(folder, model)


def check_context(requests: Sequence[Request], context: int | None, encoder: Encoder | None) -> None:
    """Refuse prompts that leave no room for the longest response.

    Args:
        requests: of one task
        context: tokens that prompt and response may have together; None where that is not known
        encoder: None where only the servers have the tokenizer; then the responses alone are compared

    Raises:
        UserError: one is too long
    """
    if context is None or not requests:
        return
    prompts = {request.messages for request in requests}
    prompt = max(len(encoder.ids(messages)) for messages in prompts) if encoder is not None else 0
    new = requests[0].sampling.max_new_tokens
    if prompt + new > context:
        raise UserError(
            f"{requests[0].task}: a prompt of {prompt} tokens and up to {new} new ones exceed the model's context of"
            f" {context}; give benchmark.max_new_tokens={max(context - prompt, 1)} or less"
        )


def check_room(requests: Sequence[Request], there: int, folder: Path) -> None:
    """Refuse more responses than the disk of a folder has room for; raises UserError.

    Args:
        there: bytes of responses to these requests that are stored already
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = BYTES_A_TOKEN * sum(request.sampling.max_new_tokens for request in requests) - there
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {len(requests)} responses may take {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left"
        )
