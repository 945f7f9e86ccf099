"""The three scripts end to end, run as a user runs them, on a cut-down demo study with a tiny random student."""

import csv
import html
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from branches import metrics
from transformers import AutoModelForCausalLM, AutoTokenizer
from wandb.proto.wandb_internal_pb2 import Record
from warm import Warm

from branchmerge.study import read_manifest

PROJECT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


def arguments(name: str, student: Path, outputs: Path, *overrides: str) -> list[str]:
    flags = [override for override in overrides if override.startswith("-")]
    own = ["study=tiny", f"backbone.pretrained={student}", f"outputs={outputs}"]
    rest = [override for override in overrides if not override.startswith("-")]
    return [f"{name}.py", "--config-dir", "tests/conf", *flags, *own, *rest]


@pytest.fixture(scope="module")
def run_warm() -> Iterator[Run]:
    """`run_script` without what importing takes, for what does not depend on a fresh process."""
    warm = Warm()

    def run(name: str, student: Path, outputs: Path, *overrides: str, **env: str) -> subprocess.CompletedProcess[str]:
        return warm.run(*arguments(name, student, outputs, *overrides), **env)

    yield run
    warm.end()


def run_script(
    name: str, student: Path, outputs: Path, *overrides: str, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments(name, student, outputs, *overrides)]
    return subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        env={**os.environ, **env},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Outputs of a study that went through all three scripts, and what each printed."""
    outputs = tmp_path_factory.mktemp("outputs")
    said = {}
    for title, name, *overrides in (
        ("train", "train", "-m", "domain=math,code,science"),
        ("merge", "merge", "-m", "operator.lam=0.5,1.5"),
        ("linear", "merge", "operator=task_arithmetic"),
        ("evaluate", "evaluate", "benchmark.limit=4"),
    ):
        done = run_script(name, tiny_student, outputs, *overrides)
        assert done.returncode == 0, done.stderr
        said[title] = done.stdout
    return outputs, said


def test_every_result_is_there_and_loads(finished: tuple[Path, dict[str, str]]) -> None:
    study = finished[0] / "tiny"
    kinds = {
        "backbone": "backbone", "experts/math": "expert", "experts/code": "expert", "experts/science": "expert",
        "merged/arcee_fusion": "merged", "merged/arcee_fusion-lam0.5": "merged", "merged/task_arithmetic": "merged",
    }  # fmt: skip
    for name, kind in kinds.items():
        manifest = read_manifest(study / name)
        assert manifest is not None and manifest.kind == kind
        model = AutoModelForCausalLM.from_pretrained(study / name)
        assert model.num_parameters() > 10_000
        assert AutoTokenizer.from_pretrained(study / name).chat_template


def test_lineage_goes_back_to_the_backbone(finished: tuple[Path, dict[str, str]]) -> None:
    study = finished[0] / "tiny"
    backbone, math, merged = (read_manifest(study / n) for n in ("backbone", "experts/math", "merged/arcee_fusion"))
    assert backbone is not None and math is not None and merged is not None
    assert [parent.weights_sha256 for parent in math.parents] == [backbone.weights_sha256]
    assert [Path(parent.path).name for parent in merged.parents] == ["code", "science", "math"]
    assert merged.parents[2].weights_sha256 == math.weights_sha256


def test_scores_samples_and_report_agree(finished: tuple[Path, dict[str, str]]) -> None:
    outputs, said = finished
    study = outputs / "tiny"
    with (study / "report" / "scores.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 7 * 3
    assert [row["model"] for row in rows[::3]] == [
        "backbone", "experts/math", "experts/code", "experts/science",
        "merged/arcee_fusion", "merged/arcee_fusion-lam0.5", "merged/task_arithmetic",
    ]  # fmt: skip
    for row in rows:
        folder = study / "scores" / row["model"]
        score = json.loads((folder / f"{row['task']}.json").read_text())
        samples = [json.loads(line) for line in (folder / "samples" / f"{row['task']}.jsonl").read_text().splitlines()]
        assert len(samples) == score["questions"] == 4
        assert sum(sample["accuracy"] for sample in samples) / 4 == score["value"] == float(row["accuracy"])
    page = (study / "report" / "index.html").read_text()
    table = (study / "report" / "report.md").read_text()
    assert "merged/arcee_fusion" in page and "| merged/arcee_fusion |" in table
    assert (study / "report" / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "merged/arcee_fusion" in said["evaluate"]
    for row in rows:
        place = f"samples/{row['model']}/{row['task']}.html"
        assert f'href="{place}"' in page
        read = html.unescape((study / "report" / place).read_bytes().decode())
        samples = (study / "scores" / row["model"] / "samples" / f"{row['task']}.jsonl").read_text().splitlines()
        assert all(json.loads(line)["response"] in read for line in samples)
    with (study / "report" / "comparisons.csv").open() as lines:
        compared = list(csv.DictReader(lines))
    assert {(row["model"], row["task"]) for row in compared} == {(row["model"], row["task"]) for row in rows[3:]}
    assert {row["against"] for row in compared} == {"backbone"}
    assert said["evaluate"].splitlines()[-1] == f"report: {study / 'report' / 'index.html'}"


def test_a_second_call_skips_what_is_done(
    finished: tuple[Path, dict[str, str]], tiny_student: Path, run_warm: Run
) -> None:
    outputs = finished[0]
    weights = sorted(outputs.rglob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    again = run_warm("train", tiny_student, outputs, "-m", "domain=math,code,science")
    assert again.returncode == 0 and again.stdout.count("done already") == 6  # a backbone and a branch, three times
    scored = run_warm("evaluate", tiny_student, outputs, "benchmark.limit=4")
    assert scored.returncode == 0 and "scoring" not in scored.stdout
    assert sorted(outputs.rglob("*.safetensors")) == weights
    assert [path.stat().st_mtime_ns for path in weights] == before


def test_checkpoints_and_rows_of_ones_own(
    finished: tuple[Path, dict[str, str]], tiny_student: Path, tmp_path: Path, run_warm: Run
) -> None:
    """README's last example: any folder as backbone, any JSONL as data, any folder for the result, then merged."""
    outputs = finished[0]
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "hello"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    mine = tmp_path / "mine"
    own = (f"backbone.path={tiny_student}", f"data.path={rows}", f"out={mine}", "domain=math")
    trained = run_warm("train", tiny_student, outputs, *own)
    assert trained.returncode == 0, trained.stderr
    manifest = read_manifest(mine)
    assert manifest is not None and manifest.data["sources"]["data.path"]["unverified"] == 1
    fused = tmp_path / "fused"
    expert = outputs / "tiny" / "experts" / "math"
    merged = run_warm("merge", tiny_student, outputs, f"tree=[{mine},{expert}]", f"out={fused}")
    assert merged.returncode == 0, merged.stderr
    report = tmp_path / "report"
    scored = run_warm("evaluate", tiny_student, outputs, f"models=[{fused}]", "benchmark.limit=2", f"out={report}")
    assert scored.returncode == 0, scored.stderr
    assert "others/fused-" in (report / "report.md").read_text()


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("train", ["optim.learning_rate=1"], "optim.learning_rate: there is no such key; optimizer, epochs,"),
        ("train", ["-m", "domain=math,cod"], "domain=cod: there is no conf/domain/cod.yaml"),
        ("merge", [], "there is no expert 'code'"),
        ("merge", ["tree=[math]"], "two or more"),
        ("evaluate", ["models=[merged/ties]"], "merged/ties is not finished"),
        ("train", ["domain=math", "backbone.path=/no/such/model"], "/no/such/model: no such folder"),
        ("train", ["domain=math", "data.path=/no/rows.jsonl"], "/no/rows.jsonl: no such file"),
        ("train", ["domain=math", "outputs=/proc/none"], "/proc/none: cannot be made or read (No such file or"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, overrides: list[str], said: str, tiny_student: Path, tmp_path: Path, run_warm: Run
) -> None:
    failed = run_warm(name, tiny_student, tmp_path / "outputs", *overrides)
    assert failed.returncode != 0
    errors = [line for line in failed.stderr.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and said in errors[0]
    assert not list((tmp_path / "outputs").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("train", "domain=maths", "domain=maths: there is no conf/domain/maths.yaml; choose one of code, math"),
        ("merge", "operator=ties2", "operator=ties2: there is no conf/operator/ties2.yaml; choose one of arcee"),
        ("evaluate", "benchmark=aime", "benchmark=aime: there is no conf/benchmark/aime.yaml"),
    ],
)
def test_a_fresh_process_says_nothing_but_the_mistake(
    name: str, override: str, said: str, tiny_student: Path, tmp_path: Path
) -> None:
    failed = run_script(name, tiny_student, tmp_path, override)
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.count("\n") == 1 and failed.stderr.startswith("error: ") and said in failed.stderr


def test_a_malformed_row_names_file_and_line_before_anything_is_trained(
    tiny_student: Path, tmp_path: Path, run_warm: Run
) -> None:
    rows = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows.write_text(json.dumps(good) + "\n" + json.dumps({"messages": good["messages"][:1]}) + "\n")
    own = ("domain=math", f"data.path={rows}", f"backbone.path={tiny_student}")
    failed = run_warm("train", tiny_student, tmp_path / "outputs", *own)
    assert failed.returncode == 1
    assert f"{rows}:2: " in failed.stderr and "no assistant turn" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_what_the_warm_up_does_not_have_is_told_before_it(tiny_student: Path, tmp_path: Path, run_warm: Run) -> None:
    occupied = tmp_path / "mine"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("")
    for override, said in (
        ("data.validation_rows=30", "data.validation_rows=30: of 20 rows of code only"),
        ("optim.optimizer=adamw_8bit", "torchao is not installed"),
        (f"out={occupied}", "exists and is no result of branchmerge"),
    ):
        failed = run_warm("train", tiny_student, tmp_path / "outputs", "domain=code", override)
        assert failed.returncode == 1 and said in failed.stderr, failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "outputs" / "tiny" / "backbone").exists()


def test_full_error_shows_the_traceback(tiny_student: Path, tmp_path: Path, run_warm: Run) -> None:
    failed = run_warm("merge", tiny_student, tmp_path, "tree=[math]", HYDRA_FULL_ERROR="1")
    assert failed.returncode == 1 and "Traceback" in failed.stderr and "two or more" in failed.stderr


def test_a_failed_member_of_a_multirun_fails_the_whole_and_spares_the_others(
    tiny_student: Path, tmp_path: Path, run_warm: Run
) -> None:
    """Where it is known before the first begins, none does."""
    outputs, rows = tmp_path / "outputs", tmp_path / "rows.jsonl"
    own = (f"backbone.path={tiny_student}", "-m", "domain=code,math", f"study.corpus.code.path={rows}")
    failed = run_warm("train", tiny_student, outputs, *own)
    assert failed.returncode == 1
    assert "rows.jsonl: no such file" in failed.stderr and "Traceback" not in failed.stderr
    assert not (outputs / "tiny" / "experts").exists()
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "\\boxed{5}"}]
    rows.write_text(json.dumps({"messages": turns, "reference": {"grader": "math", "answer": "4"}}) + "\n")
    failed = run_warm("train", tiny_student, outputs, *own)
    assert failed.returncode == 1
    assert "error: domain=code: a process of it ended with an error; it is told above" in failed.stderr
    assert read_manifest(outputs / "tiny" / "experts" / "math") is not None
    assert read_manifest(outputs / "tiny" / "experts" / "code") is None


def test_members_know_their_number_and_folder_whatever_made_them_several(
    tiny_student: Path, tmp_path: Path, run_warm: Run
) -> None:
    """Here an override of Hydra's mode, which must not make each of them several again."""
    own = (f"backbone.path={tiny_student}", "++hydra.mode=MULTIRUN", "seed=1,2", "optim.max_steps=1")
    place = f"hydra.sweep.dir='{tmp_path}/a sweep'", "out=${hydra:runtime.output_dir}/x${hydra:job.num}"
    done = run_warm("train", tiny_student, tmp_path, "domain=math", *own, *place)
    assert done.returncode == 0, done.stdout + done.stderr
    for number in (0, 1):
        made = read_manifest(tmp_path / "a sweep" / str(number) / f"x{number}")
        assert made is not None and made.seeds == {"seed": number + 1}


def test_members_that_would_make_the_same_result_are_told_before_the_first(
    tiny_student: Path, tmp_path: Path, run_warm: Run
) -> None:
    own = (f"backbone.path={tiny_student}", "-m", "domain=math", "optim.lr=1e-3,1e-4")
    failed = run_warm("train", tiny_student, tmp_path, *own)
    assert failed.returncode == 1 and len(failed.stderr.strip().splitlines()) == 1
    assert "experts/math: would be made twice, with optim.lr=0.001 and with optim.lr=0.0001; put what" in failed.stderr
    assert not (tmp_path / "tiny" / "experts").exists()


def test_a_study_makes_its_backbone_unvalidated_on_the_way_to_a_validated_branch(
    tiny_student: Path, tmp_path: Path, run_warm: Run
) -> None:
    """The warm-up trains on what it always does, whatever a branch holds out."""
    held_out = ("data.validation_rows=4", "trainer.validate_every_n_steps=2")
    done = run_warm("train", tiny_student, tmp_path, "domain=math", *held_out)
    assert done.returncode == 0, done.stdout + done.stderr
    made = read_manifest(tmp_path / "tiny" / "backbone")
    assert made is not None and "held_out" not in made.data
    assert "step 3: validation loss math" in done.stdout and "math: step 3/3  loss" in done.stdout


def test_branches_side_by_side_make_the_backbone_once(tiny_student: Path, tmp_path: Path) -> None:
    commands = [
        [sys.executable, *arguments("train", tiny_student, tmp_path, f"domain={domain}")] for domain in ("math", "code")
    ]
    both = [
        subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    printed = "".join(out for out, _ in said)
    assert printed.count("training domain warmup") == 1
    backbone = read_manifest(tmp_path / "tiny" / "backbone")
    assert backbone is not None
    for domain in ("math", "code"):
        expert = read_manifest(tmp_path / "tiny" / "experts" / domain)
        assert expert is not None and expert.parents[0].weights_sha256 == backbone.weights_sha256


def test_kill_9_in_a_branch_leaves_nothing_finished_and_the_same_command_goes_on(
    tiny_student: Path, tmp_path: Path, run_warm: Run
) -> None:
    # A budget that lasts for minutes, so that the kill surely comes in the middle of training.
    long = ("domain=math", "optim.epochs=2000", "optim.max_steps=20000")
    command = [sys.executable, *arguments("train", tiny_student, tmp_path, *long)]
    branch = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    curve = tmp_path / "tiny" / "logs" / "train" / "math" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (curve.is_file() and len(curve.read_text().splitlines()) > 3):
        assert branch.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    branch.send_signal(signal.SIGKILL)
    branch.wait()
    expert = tmp_path / "tiny" / "experts" / "math"
    assert not expert.exists()
    assert read_manifest(tmp_path / "tiny" / "backbone") is not None  # the warm-up was finished and stays
    again = run_warm("train", tiny_student, tmp_path, "domain=math")
    assert again.returncode == 0 and "backbone: done already" in again.stdout
    assert read_manifest(expert) is not None
    assert not list(expert.parent.glob(".math.partial*"))


def test_a_report_without_a_place_is_told_before_anything_is_asked(
    run_warm: Run, tiny_student: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = run_warm("evaluate", tiny_student, tmp_path, f"models=[{tiny_student}]", f"out={tmp_path}/file")
    assert done.returncode == 1 and f"{tmp_path}: cannot write file there" in done.stderr
    assert not list(tmp_path.rglob("responses"))


def records_of_wandb(run: Path) -> Iterator[bytes]:
    """What a run's file holds, which `wandb sync` would upload: LevelDB's log format after a header of 7 bytes."""
    data, at, parts = run.read_bytes(), 7, b""
    while at < len(data):
        in_block = 32_768 - at % 32_768
        if in_block < 7:
            at += in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield parts
            parts = b""


def losses_of_wandb(run: Path) -> list[float]:
    losses = []
    for data in records_of_wandb(run):
        record = Record()
        record.ParseFromString(data)
        found = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        losses += [float(found["loss"])] if "loss" in found else []
    return losses


@pytest.mark.parametrize(
    ("key", "server", "said"),
    [
        ("", "", ""),
        # Where nobody listens; slow, as W&B's own process asks again and again.
        pytest.param("0" * 40, "http://127.0.0.1:9", "warning: W&B: ", marks=pytest.mark.slow),
    ],
)
def test_wandb_without_a_key_or_a_server_is_offline_and_asks_nothing(
    key: str, server: str, said: str, tiny_student: Path, tmp_path: Path
) -> None:
    hidden = {"HOME": str(tmp_path / "home"), "WANDB_API_KEY": key, "WANDB_MODE": "", "WANDB_INIT_TIMEOUT": "10"}
    hidden |= {"WANDB_BASE_URL": server} if server else {}
    own = (f"backbone.path={tiny_student}", "domain=code", "logger=wandb")
    done = run_script("train", tiny_student, tmp_path, *own, **hidden)
    assert done.returncode == 0, done.stderr
    assert ("warning: W&B: " in done.stdout) == bool(said)
    logs = tmp_path / "tiny" / "logs" / "train" / "code"
    (run,) = logs.glob("wandb/offline-run-*/*.wandb")
    losses = [float(row["loss"]) for row in metrics(tmp_path, "code")]
    assert len(losses) > 1 and losses_of_wandb(run) == pytest.approx(losses)
