"""Responses are kept as they come, found again for the very same request only, and survive what runs die of."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from branchmerge.errors import UserError
from branchmerge.evaluation.requests import Request, Response, Sampling, requests_for, seed_of
from branchmerge.evaluation.sample_store import SampleStore
from branchmerge.trajectories.schema import Message

FACTS = {"weights_sha256": "ab12", "task_version": "1.0", "backend": "hf"}
SAMPLING = Sampling(max_new_tokens=64, temperature=0.6, top_p=0.95)
REQUESTS = requests_for("aime24", [("q1", (Message("user", "1+1?"),))], 4, SAMPLING, seed=42)
REQUEST, RESPONSE = REQUESTS[0], Response("é <think>\n\n</think>\u2028\\boxed{2}", 9, "stop")


def test_what_was_added_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "responses" / "aime24.jsonl"
    with SampleStore(path, FACTS) as store:
        assert store.get(REQUEST) is None
        store.add([(REQUEST, RESPONSE)])
        assert store.get(REQUEST) == RESPONSE
    with SampleStore(path, FACTS) as store:
        assert store.get(REQUEST) == RESPONSE
        assert [store.get(request) for request in REQUESTS[1:]] == [None] * 3


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, sampling=replace(SAMPLING, temperature=0.7)),
        replace(REQUEST, sampling=replace(SAMPLING, top_k=50)),
        replace(REQUEST, sampling=replace(SAMPLING, max_new_tokens=65)),
        replace(REQUEST, messages=(Message("system", "Think."), *REQUEST.messages)),
        replace(REQUEST, seed=7),
        replace(REQUEST, sample=1),
        replace(REQUEST, task="aime25"),
        replace(REQUEST, question="q2"),
    ],
)
def test_another_request_gets_none_of_it(tmp_path: Path, other: Request) -> None:
    with SampleStore(tmp_path / "a.jsonl", FACTS) as store:
        store.add([(REQUEST, RESPONSE)])
        assert store.get(other) is None


@pytest.mark.parametrize("key", sorted(FACTS))
def test_another_model_backend_or_task_gets_none_of_it(tmp_path: Path, key: str) -> None:
    with SampleStore(tmp_path / "a.jsonl", FACTS) as store:
        store.add([(REQUEST, RESPONSE)])
    with SampleStore(tmp_path / "a.jsonl", {**FACTS, key: "other"}) as store:
        assert store.get(REQUEST) is None
        store.add([(REQUEST, Response("other", 1, "stop"))])
    with SampleStore(tmp_path / "a.jsonl", FACTS) as store:
        assert store.get(REQUEST) == RESPONSE


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_torn_last_line_is_removed_and_the_others_stay(tmp_path: Path, left: int) -> None:
    path = tmp_path / "a.jsonl"
    with SampleStore(path, FACTS) as store:
        store.add([(request, RESPONSE) for request in REQUESTS[:2]])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:left])
    with SampleStore(path, FACTS) as store:
        assert [store.get(request) for request in REQUESTS[:2]] == [RESPONSE, None]
        store.add([(REQUESTS[1], RESPONSE)])
    assert path.read_bytes() == first + second


def test_a_damaged_line_is_named_and_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "x", "text": "a", "tokens": 1, "finish": "stop"}\n{"key": \n')
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 is damaged"):
        SampleStore(path, FACTS)


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    """64 samples of long responses have gigabytes; of those of another model nothing is kept, either."""
    path = tmp_path / "a.jsonl"
    with SampleStore(path, FACTS, "another's files") as store:
        for request in requests_for("aime24", [(f"q{n}", ()) for n in range(16)], 4, SAMPLING, seed=42):
            store.add([(request, Response("x" * 200_000, 9, "length"))])
    tracemalloc.start()
    with SampleStore(path, FACTS, "its files"):
        _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < path.stat().st_size / 4


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_sample_store import FACTS, REQUESTS, RESPONSE
from branchmerge.evaluation.sample_store import SampleStore
store = SampleStore(Path(sys.argv[1]), FACTS)
for request in REQUESTS:
    store.add([(request, RESPONSE)])
    print(request.sample, flush=True)
    if request.sample == 2:
        sys.stdin.read()  # until it is killed
"""


def test_what_was_said_to_be_stored_survives_kill_9(tmp_path: Path) -> None:
    path, here = tmp_path / "a.jsonl", str(Path(__file__).parent)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), here], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert [writer.stdout.readline() for _ in range(3)] == ["0\n", "1\n", "2\n"]
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    with SampleStore(path, FACTS) as store:
        assert [store.get(request) is not None for request in REQUESTS] == [True, True, True, False]


def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_sample_store import FACTS, REQUESTS, RESPONSE
from branchmerge.errors import UserError
from branchmerge.evaluation.sample_store import SampleStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path / "a.jsonl")!r})
store = SampleStore(path, FACTS)
store.add([(REQUESTS[0], RESPONSE)])
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
try:
    store.add([(REQUESTS[1], RESPONSE)])
except UserError as error:
    print(error)
assert path.stat().st_size == size
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot store responses (File too large)" in done.stdout
    with SampleStore(tmp_path / "a.jsonl", FACTS) as store:
        assert [store.get(request) is not None for request in REQUESTS] == [True, False, False, False]


def test_every_sample_has_a_seed_of_its_own_that_depends_on_nothing_else() -> None:
    seeds = {request.seed for request in requests_for("t", [(f"q{n}", ()) for n in range(30)], 16, SAMPLING, 42)}
    assert len(seeds) == 480 and all(0 <= seed < 1 << 31 for seed in seeds)
    assert seed_of(42, "t", "q7", 3) in seeds
    assert seed_of(43, "t", "q7", 3) not in seeds


def test_a_lines_seed_and_sample_can_be_read(tmp_path: Path) -> None:
    with SampleStore(tmp_path / "a.jsonl", FACTS) as store:
        store.add([(REQUESTS[3], RESPONSE)])
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert (row["question"], row["sample"], row["seed"], row["text"]) == ("q1", 3, REQUESTS[3].seed, RESPONSE.text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"until": [], "do_sample": False, "max_gen_toks": 64}, Sampling(64)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_gen_toks": 32768, "until": []},
         Sampling(32768, 0.6, 0.95)),
        ({"do_sample": True, "temperature": 0.6, "top_k": -1, "max_gen_toks": 8, "until": "\n"},
         Sampling(8, 0.6, until=("\n",))),
        ({"temperature": 0.0, "max_gen_toks": 8}, Sampling(8)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5, "top_k": 5, "max_gen_toks": 8}, Sampling(8)),
    ],
)  # fmt: skip
def test_generation_kwargs_are_read_as_lm_eval_means_them(given: dict[str, object], expected: Sampling) -> None:
    assert Sampling.parse("t", given) == expected


def test_a_key_that_nothing_would_apply_is_refused() -> None:
    with pytest.raises(UserError, match="t: generation_kwargs has num_beams=4"):
        Sampling.parse("t", {"num_beams": 4})
