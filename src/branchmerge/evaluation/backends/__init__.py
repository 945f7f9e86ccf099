"""Backends generate responses. Each takes requests and yields responses as they come, in any order:

generate(requests)  yields lists of (request, response)
failures            errors of requests of the last `generate` that got no response
close()             frees its memory
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from branchmerge.config import BackendConfig
from branchmerge.evaluation.requests import Request, Response
from branchmerge.student.backbone import context_length


class Backend(Protocol):
    """The interface of a backend, described above."""

    failures: list[str]

    def close(self) -> None: ...

    def generate(self, requests: Sequence[Request]) -> Iterator[list[tuple[Request, Response]]]: ...


def load(backend: BackendConfig, folder: Path | None) -> Backend:
    """Load a checkpoint, or connect to the servers that have one."""
    if backend.kind == "openai":
        from branchmerge.evaluation.backends.openai import Servers
        from branchmerge.evaluation.encoding import Encoder

        return Servers(backend, Encoder(folder) if folder is not None else None)
    if backend.kind == "vllm":
        from branchmerge.evaluation.backends.vllm import VLLM

        assert folder is not None
        return VLLM(backend, folder)
    from branchmerge.evaluation.backends.hf import Transformers

    assert folder is not None
    return Transformers(backend, folder)


def context(backend: BackendConfig, folder: Path | None) -> int | None:
    """Longest prompt plus response, in tokens; None if neither config nor servers say it.

    Raises:
        UserError: a server cannot be reached, or vLLM is not installed
    """
    if backend.kind == "openai":
        from branchmerge.evaluation.backends.openai import Servers

        return Servers(backend).context
    if backend.kind == "vllm":
        from branchmerge.evaluation.backends import vllm

        vllm.check_installed()
    assert folder is not None
    return context_length(folder)


def facts(backend: BackendConfig) -> dict[str, Any]:
    """The settings of a backend that decide its responses."""
    if backend.kind == "openai":
        return {"backend": "openai", "model": backend.model, **_where_given(revision=backend.revision)}
    from branchmerge.evaluation.backends.hf import dtype_of

    found = {"backend": backend.kind, "dtype": dtype_of(backend), "batch_size": backend.batch_size}
    return found if backend.kind == "hf" else {**found, **_where_given(vllm_arguments=list(backend.vllm_arguments))}


def _where_given(**settings: Any) -> dict[str, Any]:
    """Settings that are not empty, so that keys of responses from before a setting existed stay valid."""
    return {name: value for name, value in settings.items() if value}


def token_source(backend: BackendConfig) -> str:
    """How a backend counts the tokens of a response."""
    return "generated tokens" if backend.kind == "hf" else "tokens told by the server"
