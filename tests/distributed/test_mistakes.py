"""What several processes refuse, and how often they say it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from branches import PROJECT, branch
from conftest import make_student
from safetensors.torch import load_file, save_file
from spreading import FSDP, started

from branchmerge.errors import UserError
from branchmerge.student.launch import Branch, launch
from branchmerge.student.sharding import load_weights
from branchmerge.student.stored import empty_model
from branchmerge.student.training import train


def test_mistakes_are_told_before_any_process_starts(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="weights kept in bfloat16 stand still"):
        branch(tiny_student, tmp_path, *FSDP, "trainer.precision=bf16-true")
    experts = make_student(tmp_path / "mixtral", model_type="mixtral", num_local_experts=4)
    with pytest.raises(UserError, match="MixtralForCausalLM has other weights in memory than in its checkpoint"):
        train(branch(experts, tmp_path, *FSDP, "domain=math", "trainer.devices=1"))
    with pytest.raises(UserError, match=r"backbone\.attn=flash_attention_2: that version of flash-attn"):
        train(branch(tiny_student, tmp_path, "backbone.attn=flash_attention_2", "trainer.precision=bf16-mixed"))
    assert "kept" not in capsys.readouterr().out  # nor is any row read
    with pytest.raises(UserError, match="is a training on one device"):
        branch(tiny_student, tmp_path, "trainer.strategy=single", "trainer.devices=2", "optim.global_batch=2")
    assert not branch(tiny_student, tmp_path, "trainer.devices=1").trainer.sharded
    with pytest.raises(UserError, match=r"trainer\.replicate=3: 2 devices cannot be cut into so many equal sets"):
        branch(tiny_student, tmp_path, *FSDP, "trainer.devices=2", "optim.global_batch=2", "trainer.replicate=3")
    with pytest.raises(UserError, match=r"trainer\.gpus_per_job=2: trainer\.devices=4 asks for another number"):
        branch(tiny_student, tmp_path, *FSDP, "trainer.gpus_per_job=2", "trainer.devices=4")
    alone = branch(tiny_student, tmp_path, *FSDP, "trainer.replicate=3")
    with pytest.raises(UserError, match=r"trainer\.replicate=3: 1 devices cannot be cut into so many equal sets"):
        launch([Branch(alone, "train.py", [])])
    nodes = branch(tiny_student, tmp_path, *FSDP, "trainer.num_nodes=2", "optim.global_batch=2")
    with pytest.raises(UserError, match=r"start train\.py on every node by torchrun or Slurm"):
        launch([Branch(nodes, "train.py", [])])


def test_a_mistake_that_the_processes_find_is_told_in_a_line(tiny_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "other-names"))
    weights = {f"x.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    more = ("domain=math", f"backbone.path={folder}", "trainer.devices=2", "optim.global_batch=2")
    said = started(tiny_student, tmp_path, *more).communicate(timeout=300)[0]
    assert said.count("its weights have other names than the model's, such as x.") == 1, said
    assert "Traceback" not in said


def test_files_beside_a_checkpoints_own_are_not_read(tiny_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "left-overs"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, folder / "model.zz.safetensors")
    model = empty_model(folder, "sdpa")
    load_weights(model, folder, torch.device("cpu"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters() if name in weights)


def test_processes_tell_a_mistake_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(PROJECT / "train.py"), "domain=alchemy", f"outputs={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count("error: domain=alchemy: there is no conf/domain/alchemy.yaml") == 1, done.stderr
