"""What is found wrong with a branch before its backbone is there."""

import json
from pathlib import Path

import psutil
import pytest
from branches import branch
from conftest import make_student

from branchmerge.errors import UserError
from branchmerge.machine import give_back_memory
from branchmerge.student.preflight import check_branch

SPREAD = ("domain=math", "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=4")


def test_heads_that_cannot_be_dealt_out(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.context_parallel=4: the model's num_attention_heads=4 and num_key"):
        check_branch(branch(tiny_student, tmp_path, *SPREAD, "trainer.context_parallel=4"))
    check_branch(branch(tiny_student, tmp_path, *SPREAD, "trainer.context_parallel=2"))


def test_rows_that_the_models_positions_do_not_allow(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    scaled = make_student(tmp_path / "scaled", rope_parameters=rope, max_position_embeddings=128)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data\.seq_len=256: the model's dynamic positions"):
        check_branch(branch(scaled, tmp_path, "domain=math"))


def test_another_models_shape_says_nothing_of_a_path(tmp_path: Path) -> None:
    """backbone=smollm2_135m has 9 heads; the model at the path, which is not here yet, may have others."""
    check_branch(branch(Path("Qwen/Qwen2.5-0.5B-Instruct"), tmp_path, *SPREAD, "trainer.context_parallel=2"))


def test_a_name_that_is_too_long_is_a_line(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="File name too long"):
        check_branch(branch(tiny_student, tmp_path, "domain=math", f"out={tmp_path / ('x' * 300)}"))


def test_the_rows_do_not_stay_in_memory(tiny_student: Path, tmp_path: Path) -> None:
    """The process that reads them waits for a whole training, beside the one that trains on them."""
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(4000):
            turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": str(number) * 2500}]
            file.write(json.dumps({"messages": turns}) + "\n")
    config = branch(tiny_student, tmp_path, "domain=math", f"data.path={rows}")
    give_back_memory()
    before = psutil.Process().memory_info().rss
    check_branch(config)
    assert psutil.Process().memory_info().rss - before < rows.stat().st_size / 4
