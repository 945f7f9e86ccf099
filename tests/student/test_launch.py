"""Branches side by side: which GPUs each of them sees."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from branches import branch

from branchmerge import machine
from branchmerge.errors import UserError
from branchmerge.student.launch import Branch, launch

PROGRAM = """
import json, os, sys, time
began = time.time()
time.sleep(2)
told = {"gpus": os.environ["CUDA_VISIBLE_DEVICES"], "began": began, "ended": time.time()}
with open(f"{sys.argv[1]}/{sys.argv[2]}-{os.environ['RANK']}.json", "w") as file:
    json.dump(told, file)
"""


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch would tell of them; the processes that are started use none."""
    monkeypatch.setattr(machine, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("visible", [pytest.param("", marks=pytest.mark.slow), "4,5,6,7"])
def test_members_side_by_side_see_gpus_of_their_own(
    visible: str, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    more = ("trainer=fsdp", "trainer.accelerator=gpu", "trainer.gpus_per_job=2", "optim.global_batch=2")
    members = ("math", "code", "science")
    branches = [
        Branch(branch(tiny_student, tmp_path, f"domain={name}", *more), str(program), [str(tmp_path), name])
        for name in members
    ]
    launch(branches)
    told = {name: [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in members}
    pairs = {"4,5", "6,7"} if visible else {"0,1", "2,3"}
    assert all(len({rank["gpus"] for rank in ranks}) == 1 for ranks in told.values())
    spans = [
        (ranks[0]["gpus"], max(r["began"] for r in ranks), min(r["ended"] for r in ranks)) for ranks in told.values()
    ]
    assert {gpus for gpus, _, _ in spans} == pairs
    together = [
        (one[0], other[0])
        for i, one in enumerate(spans)
        for other in spans[i + 1 :]
        if one[1] < other[2] and other[1] < one[2]
    ]
    assert together and all(one != other for one, other in together)


@pytest.mark.usefixtures("four_gpus")
def test_one_after_the_other_they_see_all_and_one_that_fails_is_named_at_the_end(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "sys.exit(3 if sys.argv[2] == 'math' else 0)\n")
    more = ("trainer=fsdp", "trainer.accelerator=gpu", "trainer.devices=1")
    branches = [
        Branch(branch(tiny_student, tmp_path, f"domain={name}", *more), str(program), [str(tmp_path), name])
        for name in ("math", "code")
    ]
    began = time.time()
    with pytest.raises(SystemExit, match="error: domain=math: a process of it ended with an error"):
        launch(branches)
    first, second = (json.loads((tmp_path / f"{name}-0.json").read_text()) for name in ("math", "code"))
    assert began < first["ended"] <= second["began"]
    assert first["gpus"] == second["gpus"] == "0,1,2,3"


@pytest.mark.usefixtures("four_gpus")
def test_a_branch_takes_all_that_are_there(tiny_student: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace('os.environ["CUDA_VISIBLE_DEVICES"]', "None"))
    wanted = branch(tiny_student, tmp_path, "domain=math", "trainer=fsdp", "trainer.accelerator=gpu")
    launch([Branch(wanted, str(program), [str(tmp_path), "math"])])
    assert sorted(path.name for path in tmp_path.glob("math-*")) == [f"math-{rank}.json" for rank in range(4)]


@pytest.mark.usefixtures("four_gpus")
def test_more_than_there_are_is_told(tiny_student: Path, tmp_path: Path) -> None:
    more = ("trainer=fsdp", "trainer.accelerator=gpu", "trainer.gpus_per_job=8", "optim.global_batch=8")
    wanted = branch(tiny_student, tmp_path, "domain=math", *more)
    with pytest.raises(UserError, match=r"trainer\.gpus_per_job=8: torch finds 4 CUDA devices here"):
        launch([Branch(wanted, "train.py", [])])


def test_each_member_has_a_process_of_its_own_and_one_that_is_killed_ends_no_other(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1]).write_text(f'{os.getpid()} {\"RANK\" in os.environ}')\n"
        "os.kill(os.getpid(), 9) if sys.argv[1].endswith('math') else None\n"
    )
    members = [
        Branch(branch(tiny_student, tmp_path, f"domain={name}"), str(program), [str(tmp_path / name)])
        for name in ("math", "code")
    ]
    with pytest.raises(SystemExit, match="error: domain=math: a process of it ended"):
        launch(members)
    assert "domain=math: was ended by SIGKILL (by the system, if it ran out of memory)" in capsys.readouterr().out
    told = [(tmp_path / name).read_text().split() for name in ("math", "code")]
    assert len({pid for pid, _ in told} | {str(os.getpid())}) == 3 and all(rank == "False" for _, rank in told)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("trainer.gpus_per_job=2", r"gpus_per_job=1,2: members"),
        ("trainer.num_nodes=2", r"num_nodes=2: start train\.py"),
    ],
)
def test_members_that_cannot_share_the_machine_are_refused(
    changes: str, says: str, tiny_student: Path, tmp_path: Path
) -> None:
    usual = ("trainer=fsdp", "trainer.accelerator=gpu", "optim.global_batch=4")
    one = branch(tiny_student, tmp_path, "domain=math", *usual, "trainer.gpus_per_job=1")
    other = branch(tiny_student, tmp_path, "domain=code", *usual, "trainer.gpus_per_job=1", changes)
    with pytest.raises(UserError, match=says):
        launch([Branch(one, "train.py", []), Branch(other, "train.py", [])])


def test_members_side_by_side_share_the_cores(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = tmp_path / "program.py"
    program.write_text("import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['OMP_NUM_THREADS'])")
    each = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.gpus_per_job=1")
    members = [
        Branch(branch(tiny_student, tmp_path, f"domain={name}", *each), str(program), [str(tmp_path / name)])
        for name in ("math", "code")
    ]
    launch(members)
    assert [(tmp_path / name).read_text() for name in ("math", "code")] == ["4", "4"]


MEMBER = """
import os, pathlib, signal, sys, time
pathlib.Path(sys.argv[1]).touch()
signal.signal(signal.SIGTERM, signal.SIG_IGN) if sys.argv[2] == "deaf" else None
for _ in range(int(sys.argv[4])):
    os.kill(os.getppid(), int(sys.argv[3]))
    time.sleep(1)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("hearing", "sent", "times"),
    [("hearing", signal.SIGTERM, 1), ("hearing", signal.SIGINT, 1), ("deaf", signal.SIGINT, 2)],
)
def test_told_to_end_none_is_begun_any_more(
    hearing: str, sent: signal.Signals, times: int, tiny_student: Path, tmp_path: Path
) -> None:
    """And a second Ctrl-C waits for none that is under way."""
    program = tmp_path / "program.py"
    program.write_text(MEMBER)
    members = [
        Branch(branch(tiny_student, tmp_path, f"domain={name}"), str(program), [str(tmp_path / name), *told])
        for name in ("math", "code")
        for told in [(hearing, str(int(sent)), str(times))]
    ]
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        launch(members)
    assert ended.value.code == 128 + sent and time.monotonic() - began < 30
    assert (tmp_path / "math").exists() and not (tmp_path / "code").exists()
