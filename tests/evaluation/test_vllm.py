"""backend=vllm for real, where vLLM is installed: `make test-vllm`."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from branches import branch

from branchmerge.config import BackendConfig
from branchmerge.errors import UserError
from branchmerge.evaluation.backends import openai
from branchmerge.evaluation.backends.hf import Transformers
from branchmerge.evaluation.backends.openai import Servers
from branchmerge.evaluation.backends.vllm import VLLM
from branchmerge.evaluation.encoding import Encoder
from branchmerge.evaluation.requests import Request, Response, Sampling, requests_for
from branchmerge.student.training import train
from branchmerge.trajectories.schema import Message

INSTALLED = importlib.util.find_spec("vllm") is not None
QUESTIONS = ["What is 12 * 7?", "A much longer question, for another length of the prompt.", "?", "Name a colour."]
ARGUMENTS = ["--max-model-len", "512", "--enforce-eager", "--gpu-memory-utilization", "0.1"]
SETTINGS = {"dtype": "float32", "device": "cpu", "batch_size": 16, "timeout_s": 120.0, "vllm_arguments": ARGUMENTS}

needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed: make test-vllm")


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_without_vllm_one_line_says_how_to_get_it(tiny_student: Path) -> None:
    with pytest.raises(UserError, match="vLLM is not installed; pip install"):
        VLLM(BackendConfig(kind="vllm"), tiny_student)


def asked(sampling: Sampling, samples: int = 1) -> list[Request]:
    return requests_for("task", [(q, (Message("user", q),)) for q in QUESTIONS], samples, sampling, seed=42)


def responses(model: Servers | Transformers, requests: list[Request]) -> dict[tuple[str, int], Response]:
    pairs = [pair for pairs in model.generate(requests) for pair in pairs]
    found = {(request.question, request.sample): response for request, response in pairs}
    assert model.failures == [] and len(found) == len(pairs) == len(requests)
    return found


def serve(student: Path, *arguments: str, data_parallel: int = 1) -> VLLM:
    settings = {**SETTINGS, "vllm_arguments": [*ARGUMENTS, *arguments], "data_parallel": data_parallel}
    return VLLM(BackendConfig(kind="vllm", **settings), student)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def student(student_factory: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert as train.py exports it; vLLM's attention on a CPU wants heads of 32 and more."""
    folder = tmp_path_factory.mktemp("student")
    start = student_factory(folder / "wide", hidden_size=128, head_dim=32)
    return train(branch(start, folder / "outputs", "domain=math", "export_dtype=float32"))


@pytest.fixture(scope="module")
def server(student: Path) -> Iterator[VLLM]:
    model = serve(student)
    yield model
    model.close()


STAND_IN = """
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.tell({"data": [{"id": "student", "owned_by": "vllm", "max_model_len": 512}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        finish, text = FINISH.get(len(body["prompt"]), ("stop", "whole"))
        if finish == "died":
            server.server_close()
            threading.Thread(target=server.shutdown).start()
            return
        self.tell({"choices": [{"text": text, "finish_reason": finish}], "usage": {"completion_tokens": 3}})

    def tell(self, said):
        raw = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.serve_forever()
"""
"""Speaks as vLLM's server does, and ends a prompt of so many tokens as it was told to"""

Stand = Callable[[dict[int, tuple[str | None, str | None]]], VLLM]


@pytest.fixture
def api_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a package named vllm that is started as its server."""
    module = tmp_path / "packages" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    for folder in list(module.parents)[:3]:
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=os.pathsep)
    return module


@pytest.fixture
def stand_in(thinking_student: Path, api_server: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """`backend=vllm` for real, with a server that has no model."""
    monkeypatch.setattr(openai, "FIRST_WAIT", 0.02)
    begun: list[VLLM] = []

    def start(finish: dict[int, tuple[str | None, str | None]]) -> VLLM:
        api_server.write_text(f"FINISH = {finish!r}\n{STAND_IN}")
        settings = BackendConfig(kind="vllm", dtype="float32", device="cpu", timeout_s=20.0, retries=1)
        begun.append(VLLM(settings, thinking_student))
        return begun[-1]

    yield start
    for server in begun:
        server.close()


def test_responses_that_vllm_did_not_end_are_failures(stand_in: Stand, thinking_student: Path) -> None:
    requests = asked(Sampling(max_new_tokens=12))
    lengths = [len(Encoder(thinking_student).ids(request.messages)) for request in requests]
    server = stand_in({lengths[0]: ("length", "cut"), lengths[1]: ("abort", "half"), lengths[2]: ("stop", None)})
    found = {request.question: response for pairs in server.generate(requests) for request, response in pairs}
    assert found == {
        QUESTIONS[0]: Response("<think>\ncut", 3, "length"),
        QUESTIONS[3]: Response("<think>\nwhole", 3, "stop"),
    }
    assert len(server.failures) == 2 and "finish_reason is abort" in "".join(server.failures)


def test_a_server_of_our_own_that_died_is_not_waited_for(stand_in: Stand, thinking_student: Path) -> None:
    requests = asked(Sampling(max_new_tokens=12))
    server = stand_in({len(Encoder(thinking_student).ids(requests[0].messages)): ("died", None)})
    began = time.monotonic()
    list(server.generate(requests[:1]))
    assert list(server.generate(requests)) == [] and len(server.failures) == 4
    assert time.monotonic() - began < 30


STARTS = """
import sys
from pathlib import Path
from branchmerge.config import BackendConfig
from branchmerge.evaluation.backends.vllm import VLLM

VLLM(BackendConfig(kind="vllm", dtype="float32", device="cpu"), Path(sys.argv[1]))
"""


def test_ctrl_c_while_a_server_starts_ends_all_that_it_started(
    api_server: Path, tiny_student: Path, tmp_path: Path
) -> None:
    api_server.write_text('import subprocess, time\nsubprocess.Popen(["sleep", "300"])\ntime.sleep(300)\n')
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(tiny_student)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert parent.stdout is not None
    assert any(line.startswith("starting vLLM") for line in parent.stdout)
    deadline = time.monotonic() + 60
    while len(children := _below(parent.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.send_signal(signal.SIGINT)
    parent.communicate()
    try:
        _wait_for_the_end(children, seconds=10)
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    assert not list(tmp_path.glob("branchmerge-vllm-*"))


@needs_vllm
@pytest.mark.slow
def test_greedy_responses_are_those_of_transformers(server: VLLM, student: Path) -> None:
    requests = asked(Sampling(max_new_tokens=12))
    model = Transformers(BackendConfig(dtype="float32", device="cpu"), student)
    ours, theirs = responses(model, requests), responses(server, requests)
    # Of a character that was cut off vLLM says nothing, transformers that there is one.
    assert {key: replace(said, text=said.text.rstrip("\ufffd")) for key, said in ours.items()} == theirs


@needs_vllm
@pytest.mark.slow
def test_an_untied_expert_in_bfloat16_is_served_too(student_factory: Callable[..., Path], tmp_path: Path) -> None:
    """Of another kind than `student`; computed in float32 by both, so that rounding decides nothing."""
    start = student_factory(tmp_path / "qwen2", model_type="qwen2", hidden_size=128, tie_word_embeddings=False)
    expert = train(branch(start, tmp_path, "domain=math", "export_dtype=bfloat16"))
    requests = asked(Sampling(max_new_tokens=12))
    ours = responses(Transformers(BackendConfig(dtype="float32", device="cpu"), expert), requests)
    server = serve(expert)
    try:
        theirs = responses(server, requests)
    finally:
        server.close()
    assert {key: replace(said, text=said.text.rstrip("\ufffd")) for key, said in ours.items()} == theirs


@needs_vllm
@pytest.mark.slow
def test_samples_differ_and_come_again_by_their_seeds(server: VLLM) -> None:
    requests = asked(Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95), samples=4)
    first = responses(server, requests)
    assert len({response.text for response in first.values()}) > 12
    assert responses(server, requests) == first


@needs_vllm
@pytest.mark.slow
def test_the_server_can_be_asked_as_any_other(server: VLLM) -> None:
    backend = BackendConfig(kind="openai", base_urls=server.backend.base_urls, model="student", timeout_s=120.0)
    servers = Servers(backend)
    assert servers.is_vllm and servers.context == 512
    requests = asked(Sampling(max_new_tokens=12))
    assert responses(servers, requests) == responses(server, requests)


@needs_vllm
@pytest.mark.slow
def test_copies_of_the_model_share_the_requests_and_end_with_their_server(server: VLLM, student: Path) -> None:
    requests = asked(Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95), samples=8)
    others = _below(os.getpid())
    copies = serve(student, data_parallel=2)
    try:
        assert responses(copies, requests) == responses(server, requests)
        told = httpx.get(copies.backend.base_urls[0].removesuffix("v1") + "metrics").text
        answered = {"0": 0.0, "1": 0.0}
        for engine, number in re.findall(r'^vllm:request_success_total{engine="(.)".* (.*)$', told, re.MULTILINE):
            answered[engine] += float(number)
        assert min(answered.values()) > 0 and sum(answered.values()) == len(requests)
        started = {pid for pid in _below(os.getpid()) - others if Path(f"/proc/{pid}").exists()}
        os.kill(next(pid for pid in started if os.getpgid(pid) == pid), signal.SIGKILL)
    finally:
        copies.close()
    _wait_for_the_end(started)


@needs_vllm
@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(student: Path) -> None:
    with pytest.raises(UserError, match=r"does not start \(Value error, .*max_model_len \(999999\) is greater"):
        serve(student, "--max-model-len", "999999")


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_vllm import serve
model = serve(Path(sys.argv[1]), data_parallel=2)
print("serving", flush=True)
sys.stdin.read()
"""


@needs_vllm
@pytest.mark.slow
def test_a_killed_evaluation_leaves_no_server(student: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(student), *map(str, list(Path(__file__).parents)[:2])]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert any(line == "serving\n" for line in parent.stdout)
    children = _below(parent.pid)
    assert len(children) > 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    _wait_for_the_end(children)


def _wait_for_the_end(pids: set[int], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _below(pid: int) -> set[int]:
    """All processes that a process started, and those that they did."""
    told = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in told.splitlines())}
    found: set[int] = set()
    while True:
        more = {child for child, parent in parents.items() if parent in {pid, *found}} - found
        if not more:
            return found
        found |= more


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
