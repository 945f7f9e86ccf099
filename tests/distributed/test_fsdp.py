"""A branch in several processes (FSDP2 over gloo) is the branch that one process trains, also across deaths."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from branches import branch, metrics
from conftest import make_student
from spreading import COMPARED, alone, assert_equal_to, run_groups, started, weights
from transformers import AutoModelForCausalLM

from branchmerge.data.batch import Batch, supervised_tokens
from branchmerge.data.datamodule import PackedRows, prepare
from branchmerge.student.backbone import load_tokenizer
from branchmerge.student.module import Student
from branchmerge.study import read_manifest, weights_sha256
from branchmerge.trajectories.sources import read_branch

SETTINGS = ("domain=math", "data.seq_len=256", "optim.epochs=2", "optim.warmup_ratio=0.0")
BATCH = "optim.global_batch=4"
LONG = (*SETTINGS, "optim.epochs=20", "optim.max_steps=20", BATCH, "data.workers=1",
        "trainer.checkpoint.every_n_steps=2")  # fmt: skip
WORLDS = (1, 2, 4)
UNEVEN = (1, 6)
"""Rows of a step that four processes cannot share equally"""
KINDS = ("qwen2", "qwen3", "mistral", "gemma")
WAYS = {
    "kept": ("trainer.activation_checkpointing=false",), "recomputed": (), "copies": ("trainer.replicate=2",),
    "offloaded": ("trainer.cpu_offload=true",), "workers": ("data.workers=2",),
}  # fmt: skip
WATCHED = (*SETTINGS, "optim.global_batch=2", "optim.max_steps=4", "data.validation_rows=7",
           "trainer.validate_every_n_steps=2", "trainer.sample_every_n_steps=2")  # fmt: skip
UNWATCHED = WATCHED[:-2]
BF16 = "trainer.precision=bf16-mixed"
PRECISE = (*SETTINGS, BATCH, "optim.lr=1e-5", "export_dtype=float32")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Long questions with an answer of a word, and short ones with long answers: packed rows of skewed shares."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(36):
            long = " ".join(f"word{j}" for j in range(10 + i))
            question, answer = (f"question {i} {long} {long}", "yes") if i % 3 else (f"question {i}", long)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": f"row-{i}", "messages": turns}) + "\n")
    return f"data.path={path}"


@pytest.fixture(scope="module")
def coins(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Programs that pass their test or fail it by chance, so that two gradings of them differ."""
    path = tmp_path_factory.mktemp("coins") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(40):
            answer = f"```python\nimport random\ndef f():\n    return random.random() < 0.5  # {i}\n```"
            turns = [{"role": "user", "content": f"Flip coin {i}."}, {"role": "assistant", "content": answer}]
            reference = {"grader": "code", "tests": ["assert f()"]}
            file.write(json.dumps({"id": f"coin-{i}", "messages": turns, "reference": reference}) + "\n")
    return f"data.path={path}"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("untied") / "qwen2", model_type="qwen2", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: make_student(folder / kind, model_type=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def spread(
    tiny_student: Path,
    untied: Path,
    kinds: dict[str, Path],
    rows: str,
    coins: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Everything that several processes train; a folder of outputs for each branch."""
    folder = tmp_path_factory.mktemp("spread")
    groups: dict[tuple[str, int], dict[Path, tuple[str, ...]]] = {
        ("torchrun", world): {
            folder / f"{world}x{n}": (*SETTINGS, rows, f"optim.global_batch={world * n}") for n in (1, 4)
        }
        for world in WORLDS
    }
    groups["torchrun", 2] |= {
        **{folder / name: (*SETTINGS, rows, BATCH, f"backbone.path={untied}", *way) for name, way in WAYS.items()},
        **{folder / kind: (*SETTINGS, rows, BATCH, f"backbone.path={kinds[kind]}") for kind in KINDS},
        folder / "bf16": (*PRECISE, rows, BF16), folder / "long": (*LONG, rows),
        folder / "watched": WATCHED, folder / "unwatched": UNWATCHED,
        folder / "coins": ("domain=math", "data.seq_len=80", "optim.global_batch=2", "optim.max_steps=null", coins),
    }  # fmt: skip
    groups["torchrun", 4][folder / "copies of shards"] = (
        *SETTINGS, rows, BATCH, f"backbone.path={untied}", *WAYS["copies"],
    )  # fmt: skip
    groups["torchrun", 4] |= {
        folder / f"4 for {n}": (*SETTINGS, rows, f"optim.global_batch={n}", "optim.max_steps=4") for n in UNEVEN
    }
    groups["torchrun", 1][folder / "bf16 of one"] = (*PRECISE, rows, BF16)
    groups["srun", 2] = {folder / "slurm": (*SETTINGS, rows, BATCH)}
    run_groups(tiny_student, groups)
    return folder


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("processes", WORLDS)
def test_neither_processes_nor_accumulation_change_a_branch(
    processes: int, accumulation: int, tiny_student: Path, rows: str, spread: Path, tmp_path: Path
) -> None:
    alone(tiny_student, tmp_path, *SETTINGS, rows, f"optim.global_batch={processes * accumulation}")
    assert_equal_to(tmp_path, spread / f"{processes}x{accumulation}")


@pytest.mark.parametrize("rows_of_a_step", UNEVEN)
def test_some_may_have_to_wait(
    rows_of_a_step: int, tiny_student: Path, rows: str, spread: Path, tmp_path: Path
) -> None:
    alone(tiny_student, tmp_path, *SETTINGS, rows, f"optim.global_batch={rows_of_a_step}", "optim.max_steps=4")
    assert_equal_to(tmp_path, spread / f"4 for {rows_of_a_step}")


def test_the_mean_of_means_would_fail_the_same_test(
    tiny_student: Path, rows: str, spread: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Student.training_step

    def naive(self: Student, batch: Batch, index: int) -> torch.Tensor:
        of_its_own = batch.supervised * self.trainer.accumulate_grad_batches
        return usual(self, replace(batch, supervised_in_step=of_its_own), index)

    monkeypatch.setattr(Student, "training_step", naive)
    alone(tiny_student, tmp_path, *SETTINGS, rows, BATCH)
    with pytest.raises(AssertionError, match="loss"):
        assert_equal_to(tmp_path, spread / "4x1")


def test_rows_of_a_step_differ_by_a_factor_of_ten_in_learned_tokens(
    tiny_student: Path, rows: str, tmp_path: Path
) -> None:
    settings = branch(tiny_student, tmp_path, *SETTINGS, rows, BATCH)
    corpus = prepare(settings, read_branch(settings), load_tokenizer(tiny_student))
    learned = [
        [sum(supervised_tokens(corpus.documents[i]) for i in row) for row in step if row] for step in corpus.plan.steps
    ]
    assert any(max(step) > 10 * min(step) for step in learned), learned


def test_processes_train_on_the_same_rows_however_grading_ends(spread: Path) -> None:
    manifest = read_manifest(spread / "coins" / "tiny" / "experts" / "math")
    assert manifest is not None
    account = manifest.data["sources"]["data.path"]
    assert 0 < account["kept"] < account["read"] == 40
    curve = metrics(spread / "coins", "math")
    assert len(curve) == manifest.training["steps"]
    assert sum(float(row["supervised_tokens"]) for row in curve) == manifest.data["supervised_tokens"]


def test_processes_that_slurm_started_find_each_other(
    tiny_student: Path, rows: str, spread: Path, tmp_path: Path
) -> None:
    alone(tiny_student, tmp_path, *SETTINGS, rows, BATCH)
    assert_equal_to(tmp_path, spread / "slurm")


def test_no_way_of_spreading_changes_a_branch(untied: Path, rows: str, spread: Path, tmp_path: Path) -> None:
    """Untied weights, recomputed activations, copies of weights and of shards, weights on the CPU, workers."""
    alone(untied, tmp_path, *SETTINGS, rows, BATCH)
    for name in (*WAYS, "copies of shards"):
        assert_equal_to(tmp_path, spread / name)
    manifest = read_manifest(spread / "copies" / "tiny" / "experts" / "math")
    assert manifest is not None and len(manifest.training["runs"][-1]["devices"]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_kinds(kind: str, kinds: dict[str, Path], rows: str, spread: Path, tmp_path: Path) -> None:
    alone(kinds[kind], tmp_path, *SETTINGS, rows, BATCH)
    assert_equal_to(tmp_path, spread / kind)


def test_weights_are_float32_where_products_are_bfloat16(
    tiny_student: Path, rows: str, spread: Path, tmp_path: Path
) -> None:
    before = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32).state_dict()
    one, two = (metrics(spread / name, "math") for name in ("bf16 of one", "bf16"))
    for name in ("loss", "grad_norm"):  # gradients that were summed in bfloat16 would be off by 1e-3
        assert [float(row[name]) for row in two] == pytest.approx([float(row[name]) for row in one], rel=1e-5)
    moved = [(tensor != before[name]).flatten() for name, tensor in weights(spread / "bf16").items()]
    assert torch.cat(moved).float().mean() > 0.99
    alone(tiny_student, tmp_path, *PRECISE, rows)
    found, expected = ([float(row["loss"]) for row in metrics(o, "math")] for o in (spread / "bf16", tmp_path))
    assert found == pytest.approx(expected, rel=2e-2) and found != pytest.approx(expected, rel=1e-6)


def test_two_processes_validate_as_one_does_and_train_as_unwatched(
    tiny_student: Path, spread: Path, tmp_path: Path
) -> None:
    alone(tiny_student, tmp_path, *WATCHED)
    names = [f"val_loss/{part}" for part in ("math", "code", "science")]
    ours, theirs = ([row for row in metrics(o, "math") if row[names[0]]] for o in (spread / "watched", tmp_path))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == ["0", "2", "4"]
    for one, other in zip(ours, theirs, strict=True):
        assert [float(one[name]) for name in names] == pytest.approx([float(other[name]) for name in names], rel=1e-5)
    samples = [(o / "tiny/logs/train/math/samples.jsonl").read_text() for o in (spread / "watched", tmp_path)]
    assert samples[0] == samples[1] and [json.loads(line)["step"] for line in samples[0].splitlines()] == [0, 2, 4]
    watched, unwatched = ([r for r in metrics(spread / name, "math") if r["loss"]] for name in ("watched", "unwatched"))
    for one, other in zip(watched, unwatched, strict=True):
        assert [one[name] for name in ("loss", "grad_norm")] == [other[name] for name in ("loss", "grad_norm")]
        assert float(one["rows"]) == 2 and float(one["padding_share"]) == 1 - float(one["tokens"]) / 512
    assert all(
        torch.equal(tensor, weights(spread / "watched")[name]) for name, tensor in weights(spread / "unwatched").items()
    )


def test_every_row_is_trained_on_once_whatever_the_number_of_processes(tiny_student: Path, tmp_path: Path) -> None:
    settings = branch(tiny_student, tmp_path, *SETTINGS, "optim.global_batch=5")
    corpus = prepare(settings, read_branch(settings), load_tokenizer(tiny_student))
    for world in (1, 2, 4):
        parts = [PackedRows(corpus.documents, corpus.plan.steps, rank, world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        batches = [part[i] for part in parts for i in range(len(part))]
        taught = sorted(name for batch in batches if batch.supervised for name in batch.ids)
        assert taught == sorted(corpus.documents[number].id for row in corpus.plan.rows for number in row)
        assert sum(batch.supervised for batch in batches) == corpus.supervised


def saved(outputs: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in outputs.glob("tiny/checkpoints/*/step-*"))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, in no order."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "RANK" in child.environ() and "train.py" in " ".join(child.cmdline()[1:3])]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_branch_outlives_sigterm_the_death_of_a_process_and_of_all(
    tiny_student: Path, rows: str, spread: Path, tmp_path: Path
) -> None:
    """Each time the same command goes on: at the end are the curve and the bits of a run that nothing happened to."""
    settings = (*LONG, rows, "trainer.devices=2")
    outputs = tmp_path / "outputs"

    process = started(tiny_student, outputs, *settings)
    wait_for(lambda: saved(outputs), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM and "told to end after step" in said, said
    assert "Traceback" not in said
    first = max(saved(outputs))

    process = started(tiny_student, outputs, *settings)
    wait_for(lambda: max(saved(outputs)) > first, process)
    processes = workers_of(process)
    victim = next(worker for worker in processes if worker.environ()["RANK"] == "1")
    victim.kill()
    began = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 60 and process.returncode not in (0, None), said
    assert f"going on after step {first} of 20" in said
    assert "error: rank 1 was ended by SIGKILL" in said
    assert "error: domain=math: a process of it ended with an error" in said
    assert not [worker for worker in processes if is_alive(worker)]
    second = max(saved(outputs))

    process = started(tiny_student, outputs, *settings)
    wait_for(lambda: max(saved(outputs)) > second, process)
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    process.communicate()
    assert not (outputs / "tiny" / "experts" / "math").exists()

    shutil.copytree(outputs, tmp_path / "one", ignore=shutil.ignore_patterns("*.lock"))
    alone(tiny_student, tmp_path / "one", *LONG, rows)
    assert_equal_to(spread / "long", tmp_path / "one")

    shutil.copytree(outputs, tmp_path / "four", ignore=shutil.ignore_patterns("*.lock"))
    last = max((tmp_path / "four").glob("tiny/checkpoints/*/step-*"))
    damaged = bytearray((last / "state" / "__1_0.distcp").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (last / "state" / "__1_0.distcp").write_bytes(damaged)
    settings = (*LONG, rows)
    said = run_groups(
        tiny_student, {("torchrun", 2): {outputs: settings}, ("torchrun", 4): {tmp_path / "four": settings}}
    )
    assert said.count("going on after step") == 2
    assert f"{last}: not whole (state/__1_0.distcp has changed); going on from the one before" in said
    assert_equal_to(spread / "long", tmp_path / "four")
    manifest = read_manifest(tmp_path / "four" / "tiny" / "experts" / "math")
    assert manifest is not None
    runs = [(run["from_step"], len(run["devices"])) for run in manifest.training["runs"]]
    assert runs[:2] == [(0, 2), (first, 2)] and runs[-1][1] == 4 and runs == sorted(runs)
    experts = [each / "tiny" / "experts" / "math" for each in (outputs, spread / "long")]
    assert weights_sha256(experts[0]) == weights_sha256(experts[1])
    ours, theirs = metrics(outputs, "math"), metrics(spread / "long", "math")
    assert [[row[name] for name in COMPARED] for row in ours] == [[row[name] for name in COMPARED] for row in theirs]


def test_ctrl_c_saves_too(tiny_student: Path, rows: str, tmp_path: Path) -> None:
    """A terminal sends it to the process group of train.py alone: those that train are in one of their own."""
    process = started(tiny_student, tmp_path, *LONG, rows, "trainer.devices=2")
    wait_for(lambda: saved(tmp_path), process)
    groups = {os.getpgid(worker.pid) for worker in workers_of(process)}
    assert os.getpgid(process.pid) not in groups
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGINT and "told to end after step" in said, said
    assert "waiting until the processes have saved; once more to end them at once" in said
    assert "Traceback" not in said, said


@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile_costs_the_last_step(tiny_student: Path, rows: str, tmp_path: Path) -> None:
    settings = (*SETTINGS, rows, BATCH, "optim.epochs=300", "optim.max_steps=150", "trainer.devices=2")
    experts = tmp_path / "tiny" / "experts"
    experts.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", experts], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a disk in memory: {mounted.stderr.strip()}")
    try:
        process = started(tiny_student, tmp_path, *settings)
        wait_for(lambda: (tmp_path / "tiny" / "logs" / "train" / "math" / "metrics.csv").is_file(), process)
        with pytest.raises(OSError, match="No space left"):
            (experts / "filler").write_bytes(bytes(4 << 20))
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 1 and "cannot write the weights (No space left on device); make room" in said, said
        assert "Traceback" not in said, said
        assert saved(tmp_path) == [149]
        (experts / "filler").unlink()
        process = started(tiny_student, tmp_path, *settings)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0 and "going on after step 149 of 150" in said, said
        assert read_manifest(experts / "math") is not None
    finally:
        subprocess.run(["umount", "--lazy", experts], check=True)


@pytest.mark.slow
def test_members_of_a_multirun_train_side_by_side_in_processes_of_their_own(tiny_student: Path, tmp_path: Path) -> None:
    more = ("optim.epochs=2", "optim.max_steps=2", "optim.global_batch=2", "trainer.gpus_per_job=1")
    process = started(tiny_student, tmp_path, "domain=math,code", *more, multirun=True)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    for domain in ("math", "code"):
        manifest = read_manifest(tmp_path / "tiny" / "experts" / domain)
        assert manifest is not None and manifest.training["steps"] == 2
