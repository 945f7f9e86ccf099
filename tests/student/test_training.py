"""A branch, from rows on disk to an expert on disk, in this process."""

import json
import math
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from branches import PROJECT, branch, metrics
from conftest import make_student
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from branchmerge.data.batch import make_batch
from branchmerge.data.datamodule import prepare
from branchmerge.data.template import Document
from branchmerge.errors import UserError
from branchmerge.files import file_sha256
from branchmerge.student import attention, places
from branchmerge.student.backbone import load_model, load_tokenizer, locate
from branchmerge.student.checkpoints import CheckpointFolder
from branchmerge.student.loss import summed_loss
from branchmerge.student.module import Student
from branchmerge.student.optim import lr_factor
from branchmerge.student.sharding import compile_layers
from branchmerge.student.training import train
from branchmerge.study import Study, locked, read_manifest, weights_sha256
from branchmerge.trajectories.sources import read_branch


def test_a_branch_becomes_an_expert_with_manifest_and_curves(tiny_student: Path, tmp_path: Path) -> None:
    folder = train(branch(tiny_student, tmp_path, "domain=math"))
    assert folder == tmp_path / "tiny" / "experts" / "math"
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.kind == "expert"
    account = manifest.data["sources"]["math"]
    assert account["read"] == 40 == account["kept"] + sum(account["dropped"].values())
    assert account["dropped"] == {"wrong_answer": account["dropped"]["wrong_answer"]}
    rows = metrics(tmp_path, "math")
    assert len(rows) == manifest.training["steps"] == 3
    assert sum(float(row["tokens"]) for row in rows) == manifest.data["tokens"] == manifest.training["tokens"]
    assert sum(float(row["supervised_tokens"]) for row in rows) == manifest.data["supervised_tokens"]
    assert all(float(row["tokens_per_second"]) > 0 and float(row["grad_norm"]) > 0 for row in rows)
    peak = manifest.config["optim"]["lr"]
    expected = [peak * lr_factor(step, 3, 0.1, "cosine") for step in range(3)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer) == 512
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (tiny_student / name).read_bytes()


def test_rows_that_are_too_long_are_counted_and_told(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(branch(tiny_student, tmp_path, "domain=code", "data.seq_len=79"))
    manifest = read_manifest(folder)
    assert manifest is not None
    account = manifest.data["sources"]["code"]
    assert account["dropped"]["too_long"] > 0
    assert account["read"] == 20 == account["kept"] + sum(account["dropped"].values())
    assert f"code: kept {account['kept']} of 20 rows" in capsys.readouterr().out


def test_a_row_longer_than_the_models_context_is_dropped(tmp_path: Path) -> None:
    short = make_student(tmp_path / "short", max_position_embeddings=79)
    folder = train(branch(short, tmp_path, "domain=code"))
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.data["sources"]["code"]["dropped"]["too_long"] > 0


def test_a_loss_that_is_no_number_stops_the_branch_and_names_rows(tiny_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    match = r"step 2: loss nan, gradient nan on the rows (math-\d+, )+math-\d+; lower optim\.lr"
    with pytest.raises(UserError, match=match):
        train(branch(folder, tmp_path, "domain=math", "trainer.max_skipped_steps=2"))
    assert not (tmp_path / "tiny" / "experts" / "math").exists()
    twice = ("trainer.max_skipped_steps=0", "optim.epochs=2", "optim.global_batch=1000")
    with pytest.raises(UserError, match="step 0: loss nan") as told:
        train(branch(folder, tmp_path, "domain=math", *twice))
    names = re.findall(r"math-\d+", str(told.value))
    assert len(names) == len(set(names)) > 1  # though each row is in that step twice


def test_a_model_that_broke_is_not_published(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"after training .* weights such as .* hold values that are no numbers"):
        train(branch(tiny_student, tmp_path, "domain=math", "optim.lr=1e38", "optim.warmup_ratio=0"))
    assert not (tmp_path / "tiny" / "experts" / "math").exists()


def test_rows_that_change_while_a_run_waits_are_told_as_they_are_read(tiny_student: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    before = (PROJECT / "assets" / "demo" / "trajectories" / "math.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(before[:20]))
    settings = branch(tiny_student, tmp_path, "domain=math", f"data.path={rows}")
    held = threading.Event()

    def other_run() -> None:
        with locked(places.result(settings)):
            held.set()
            time.sleep(2)
            rows.write_text("".join(before[:30]))

    other = threading.Thread(target=other_run)
    other.start()
    held.wait()
    manifest = read_manifest(train(settings))
    other.join()
    assert manifest is not None
    told = manifest.data["sources"]["data.path"]
    assert told["read"] == 30 and told["sha256"] == file_sha256(rows)
    assert manifest.work["data"]["sources"][0]["sha256"] == told["sha256"]


def test_the_last_steps_without_a_gradient_are_told(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(
        branch(
            tiny_student, tmp_path, "domain=math", "optim.lr=1e30", "optim.schedule=constant", "optim.warmup_ratio=0"
        )
    )
    assert "warning: the last 2 of 3 steps had no finite loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer_config.json"])
def test_another_shape_template_or_tokenizer_makes_another_expert(
    name: str, tiny_student: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "student"))
    train(branch(folder, tmp_path, "domain=math", "optim.max_steps=1"))
    text = (folder / name).read_text()
    (folder / name).write_text(text + " " if name.endswith("jinja") else json.dumps(json.loads(text) | {"new": 1}))
    with pytest.raises(UserError, match=rf"holds a result made otherwise \(backbone\.{name}: "):
        train(branch(folder, tmp_path, "domain=math", "optim.max_steps=1"))


def test_an_expert_from_before_its_backbones_files_were_recorded_stays(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = branch(tiny_student, tmp_path, "domain=math", "optim.max_steps=1")
    manifest = train(settings) / "manifest.json"
    before = json.loads(manifest.read_text())
    del before["work"]["backbone"]
    manifest.write_text(json.dumps(before))
    train(settings)
    assert "done already" in capsys.readouterr().out and json.loads(manifest.read_text()) == before


def test_gpt_2s_context_is_seen(tmp_path: Path) -> None:
    short = make_student(tmp_path / "short", model_type="gpt2", n_positions=79, max_position_embeddings=79)
    manifest = read_manifest(train(branch(short, tmp_path, "domain=code")))
    assert manifest is not None and manifest.data["sources"]["code"]["dropped"]["too_long"] > 0


def test_training_is_what_a_plain_loop_computes(tiny_student: Path, tmp_path: Path) -> None:
    """Fifty steps of two micro-batches against torch alone, written out here: same losses, same weights.

    Only which documents a step has is asked of the plan; each goes through the model by itself, with eager attention.
    """
    more = ("data.seq_len=256", "optim.epochs=20", "optim.max_steps=50", "optim.global_batch=2")
    settings = branch(tiny_student, tmp_path, "domain=math", *more)
    folder = train(settings)
    corpus = prepare(settings, read_branch(settings), load_tokenizer(tiny_student))
    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32, attn_implementation="eager").train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    losses, norms = [], []
    for number, step in enumerate(corpus.plan.steps):
        summed, count = torch.zeros(()), 0
        for document in (corpus.documents[i] for row in step for i in row):
            tokens = torch.tensor(document.tokens, dtype=torch.long)[None]
            answer = tokens[0, document.prompt_len :]
            logits = model(tokens, use_cache=False).logits[0, document.prompt_len - 1 : -1]
            summed = summed + torch.nn.functional.cross_entropy(logits, answer, reduction="sum")
            count += len(answer)
        (summed / count).backward()
        losses.append(float(summed.detach()) / count)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:  # five steps of warm-up, then half a cosine over the 45 others
            falling = 0.5 * (1 + math.cos(math.pi * (number - 5) / 45))
            group["lr"] = settings.optim.lr * ((number + 1) / 5 if number < 5 else falling)
        optimizer.step()
        optimizer.zero_grad()
    assert len(losses) == 50 and max(norms) > 1
    for name, expected in (("loss", losses), ("grad_norm", norms)):
        assert [float(row[name]) for row in metrics(tmp_path, "math")] == pytest.approx(expected, rel=1e-5)
    trained = load_file(folder / "model.safetensors")
    start = load_file(tiny_student / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name in trained:
            torch.testing.assert_close(trained[name], parameter.detach(), atol=2e-6, rtol=1e-5)
            assert not torch.equal(trained[name], start[name])


@pytest.mark.slow
def test_compiled_layers_train_alike(tiny_student: Path, tmp_path: Path) -> None:
    """A minute of compiling."""
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        train(branch(tiny_student, tmp_path / name, "domain=math", f"trainer.compile={compiled}"))
    losses = [[float(row["loss"]) for row in metrics(tmp_path / name, "math")] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow  # compiles
def test_layers_that_know_their_number_share_a_compilation(tmp_path: Path) -> None:
    """Of ten such layers torch would compile eight."""

    def counted(module: Any, *args: Any, **more: Any) -> tuple[torch.Tensor, None]:
        out, _ = attention.packed_sdpa(module, *args, **more)
        return out * (module.layer_idx + 1), None

    AttentionInterface.register("counted", counted)
    folder = make_student(tmp_path / "student", num_hidden_layers=10)
    model = load_model(folder, torch.float32, "counted")
    row = make_batch([Document("a", np.arange(3, 40), 1)], 1)
    with torch.no_grad():
        plain = summed_loss(model, row)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_layers(model)
        torch.testing.assert_close(summed_loss(model, row), plain)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 10


def test_accumulation_does_not_change_the_update(tiny_student: Path, tmp_path: Path) -> None:
    """The same documents as one row of 512 tokens or as two shorter ones."""
    changes: list[dict[str, Any]] = []
    rows = tmp_path / "rows.jsonl"
    texts = [("Name a colour.", "blue " * 70), ("Count to three.", "one two three")]
    rows.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
            for q, a in texts
        )
    )
    for number, cut in enumerate(
        (("data.seq_len=512", "optim.global_batch=1"), ("data.seq_len=320", "optim.global_batch=2"))
    ):
        overrides = ["domain=math", f"data.path={rows}", "optim.max_steps=1", "optim.warmup_ratio=0", *cut]
        settings = branch(tiny_student, tmp_path, *overrides, f"out={tmp_path / str(number)}")
        corpus = prepare(settings, read_branch(settings), load_tokenizer(tiny_student))
        assert [len(step) for step in corpus.plan.steps] == [number + 1]
        changes.append(load_file(train(settings) / "model.safetensors"))
    for name in changes[0]:
        torch.testing.assert_close(changes[0][name], changes[1][name], atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_student: Path, tmp_path: Path) -> None:
    prints = []
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = train(branch(tiny_student, tmp_path / run, "domain=code", f"seed={seed}"))
        manifest = read_manifest(folder)
        assert manifest is not None
        prints.append(manifest.weights_sha256)
    assert prints[0] == prints[1] != prints[2]


def test_what_only_a_further_step_needs_is_gone_before_the_expert_is_written(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a GPU the Trainer would move it to the CPU's memory, which may be smaller."""
    left: list[object] = []

    def look(self: Student) -> None:
        left.extend(self.trainer.optimizers[0].state.values())
        left.extend(parameter.grad for parameter in self.parameters() if parameter.grad is not None)
        left.append(self.trainer.global_step)

    monkeypatch.setattr(Student, "on_fit_end", look)
    train(branch(tiny_student, tmp_path, "domain=math"))
    assert left == [3]


def test_finished_work_is_not_done_again(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(branch(tiny_student, tmp_path, "domain=code"))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    train(branch(tiny_student, tmp_path, "domain=code"))
    assert "done already" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"optim\.lr"):
        train(branch(tiny_student, tmp_path, "domain=code", "optim.lr=0.5"))


def test_0_clips_no_gradient(tiny_student: Path, tmp_path: Path) -> None:
    made = {}
    for limit in (0.0, 1.0, 1e9):
        folder = train(branch(tiny_student, tmp_path / str(limit), "domain=math", f"optim.grad_clip={limit}"))
        made[limit] = weights_sha256(folder)
    assert made[0.0] == made[1e9] != made[1.0]


def test_what_a_kill_after_publishing_left_is_removed(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = branch(tiny_student, tmp_path, "domain=math", "trainer.checkpoint.every_n_steps=1")
    with monkeypatch.context() as killed:
        killed.setattr(CheckpointFolder, "remove", lambda _: None)
        train(settings)
    assert list(tmp_path.glob("tiny/checkpoints/*/step-*"))
    train(settings)
    assert not (tmp_path / "tiny" / "checkpoints").exists()


def test_bfloat16_export_rounds_the_weights(tiny_student: Path, tmp_path: Path) -> None:
    exact = load_file(train(branch(tiny_student, tmp_path / "a", "domain=code")) / "model.safetensors")
    rounded = train(branch(tiny_student, tmp_path / "b", "domain=code", "export_dtype=bfloat16"))
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in load_file(rounded / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16())


def test_the_mixture_reads_all_parts(tiny_student: Path, tmp_path: Path) -> None:
    settings = branch(tiny_student, tmp_path, "domain=mixture")
    corpus = prepare(settings, read_branch(settings), load_tokenizer(tiny_student))
    assert list(corpus.account["sources"]) == ["math", "code", "science"]
    assert {document.id.split("-")[0] for document in corpus.documents} == {"math", "code", "science"}


def test_activation_checkpointing_does_not_change_the_weights(tiny_student: Path, tmp_path: Path) -> None:
    plain = load_file(train(branch(tiny_student, tmp_path / "a", "domain=code")) / "model.safetensors")
    saved = train(branch(tiny_student, tmp_path / "b", "domain=code", "trainer.activation_checkpointing=true"))
    for name, tensor in load_file(saved / "model.safetensors").items():
        torch.testing.assert_close(tensor, plain[name])


def test_bfloat16_compute_keeps_float32_weights_that_move(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: set[torch.dtype] = set()

    def look(self: Student) -> None:
        optimizer = self.trainer.optimizers[0]
        dtypes.update(state[name].dtype for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
        dtypes.update(parameter.dtype for parameter in self.parameters())

    monkeypatch.setattr(Student, "on_train_end", look)
    more = ("trainer.precision=bf16-mixed", "optim.lr=1e-5", "optim.epochs=3")
    folder = train(branch(tiny_student, tmp_path, "domain=code", *more))
    assert dtypes == {torch.float32}
    start = load_file(tiny_student / "model.safetensors")
    moved = [(tensor != start[name]).flatten() for name, tensor in load_file(folder / "model.safetensors").items()]
    assert float(torch.cat(moved).float().mean()) > 0.99


def test_the_warm_up_starts_from_the_pretrained_student_and_the_branch_from_the_warm_up(
    tiny_student: Path, tmp_path: Path
) -> None:
    own = ["backbone.path=null", f"backbone.pretrained={tiny_student}"]
    made = train(branch(tiny_student, tmp_path, "domain=warmup", *own))
    settings = branch(tiny_student, tmp_path, "domain=math", *own)
    assert made == Study(settings).backbone == locate(settings, "math")
    manifest = read_manifest(made)
    assert manifest is not None and manifest.kind == "backbone"
