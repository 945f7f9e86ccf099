"""What can be known before a model generates for hours: does everything fit, can it be graded, is there room."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from branchmerge.errors import UserError
from branchmerge.evaluation.backends import Backend
from branchmerge.evaluation.requests import Request

BYTES_A_TOKEN = 16
"""Room on the disk for a token of a stored response: its text twice, in the store and with its verdict"""


def check(backend: Backend, requests: Sequence[Request], folder: Path) -> None:
    """Refuse work that cannot end well.

    Raises:
        UserError: a prompt and its longest response exceed the model's context, or the disk is too small
    """
    tokens = sum(request.sampling.max_new_tokens for request in requests)
    free = shutil.disk_usage(folder).free
    if free < tokens * BYTES_A_TOKEN:
        raise UserError(
            f"{folder}: {len(requests)} responses may take {tokens * BYTES_A_TOKEN / 1e9:.1f} GB, the disk has"
            f" {free / 1e9:.1f} GB left"
        )
    if backend.context is None:
        return
    one_each = {request.question: request for request in requests}.values()
    longest = max(
        one_each, key=lambda request: (backend.length(request.messages) or 0) + request.sampling.max_new_tokens
    )
    prompt, new = backend.length(longest.messages) or 0, longest.sampling.max_new_tokens
    if prompt + new > backend.context:
        raise UserError(
            f"{longest.task}: a prompt of {prompt} tokens and up to {new} new ones exceed the model's context of"
            f" {backend.context}; give benchmark.max_new_tokens={max(backend.context - prompt, 1)} or less"
        )
