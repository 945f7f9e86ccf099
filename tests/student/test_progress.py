"""What is told while a branch trains: progress, padding, samples, and the rows of a step that fails."""

import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from branches import branch, metrics
from conftest import make_student
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from branchmerge.config import OptimConfig
from branchmerge.data.batch import make_batch
from branchmerge.data.datamodule import Corpus, TrajectoryData, prepare
from branchmerge.data.packing import Plan
from branchmerge.data.template import Document
from branchmerge.student import attention
from branchmerge.student.backbone import load_model, load_tokenizer
from branchmerge.student.ending import Ending
from branchmerge.student.flops import Shapes, peak_of
from branchmerge.student.loss import PackedLoss, summed_loss
from branchmerge.student.module import Student
from branchmerge.student.progress import StepProgress, utilisation
from branchmerge.student.samples import Samples
from branchmerge.student.step_rows import StepRows
from branchmerge.student.training import train
from branchmerge.trajectories.sources import read_branch

LINE = r"math: step 1/3  loss \d\.\d{4}  [\d,]+ tokens/s  ETA \d:\d\d:\d\d"


def fitted(student: Path, corpus: Corpus, folder: Path, *callbacks: Callback, workers: int = 0) -> None:
    """Train on a corpus with some callbacks alone, two rows a step."""
    model = load_model(student, torch.float32, attention.PACKED_SDPA)
    optim = OptimConfig(epochs=1, global_batch=2, lr=1e-3, schedule="constant")
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
        default_root_dir=folder, callbacks=list(callbacks), enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    data = TrajectoryData(corpus, workers=workers)
    trainer.fit(Student(PackedLoss(model), optim, len(corpus.plan.steps)), datamodule=data)


@pytest.fixture
def corpus(tiny_student: Path, tmp_path: Path) -> Corpus:
    settings = branch(tiny_student, tmp_path, "domain=math")
    return prepare(settings, read_branch(settings), load_tokenizer(tiny_student))


def test_a_log_gets_the_first_step_the_last_one_and_few_between(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(branch(tiny_student, tmp_path, "domain=math", "trainer.progress=true"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("math: step")]
    assert len(lines) == 2
    assert re.fullmatch(LINE, lines[0]) and "step 3/3" in lines[1] and "ETA 0:00:00" in lines[1]
    last = metrics(tmp_path, "math")[-1]
    assert f"loss {float(last['loss']):.4f}" in lines[1]


def test_a_sample_ends_where_the_models_positions_do(tmp_path: Path) -> None:
    short = make_student(tmp_path / "short", model_type="gpt2", n_positions=150, max_position_embeddings=150)
    watched = ("trainer.sample_every_n_steps=1", "trainer.sample_tokens=500", "optim.max_steps=1")
    train(branch(short, tmp_path, "domain=science", *watched))
    assert len((tmp_path / "tiny" / "logs" / "train" / "science" / "samples.jsonl").read_text().splitlines()) == 2


def test_between_them_lines_come_by_the_clock(tiny_student: Path, corpus: Corpus, tmp_path: Path) -> None:
    said = io.StringIO()
    fitted(tiny_student, corpus, tmp_path, StepProgress("math", Console(file=said, soft_wrap=True), interval=0))
    assert [line.split("  ")[0] for line in said.getvalue().splitlines()] == [
        "math: step 1/3", "math: step 2/3", "math: step 3/3",
    ]  # fmt: skip


def test_a_terminal_gets_a_bar_that_ends_at_the_last_step(tiny_student: Path, corpus: Corpus, tmp_path: Path) -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=120)
    fitted(tiny_student, corpus, tmp_path, StepProgress("math", console))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.getvalue())
    bars = [line for line in re.split(r"[\r\n]+", text) if line.startswith("math")]
    assert "step 3/3" in bars[-1] and "━" * 24 in bars[-1] and "tokens/s" in bars[-1]


def test_the_curve_has_rows_and_padding(tiny_student: Path, tmp_path: Path) -> None:
    train(branch(tiny_student, tmp_path, "domain=math"))
    for row in metrics(tmp_path, "math"):
        assert float(row["rows"]) == 2
        assert float(row["padding_share"]) == pytest.approx(1 - float(row["tokens"]) / 512)


def test_a_step_that_fails_names_its_rows(
    tiny_student: Path, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token that the model does not have, in the second row of the second step."""
    broken = Document("broken-1", np.array((5, 99_999, 7)), 1)
    number = len(corpus.documents)
    first, second, *_ = corpus.plan.steps
    plan = Plan((first, (second[0], (0, number))))
    with pytest.raises(IndexError):
        fitted(tiny_student, Corpus([*corpus.documents, broken], plan, {}), tmp_path, StepRows(256))
    rows = f"{corpus.documents[0].id}, broken-1"
    assert f"rank 0 failed at step 1 on the rows {rows} (IndexError)\n" in capsys.readouterr().err


def test_samples_are_what_the_model_itself_generates(tiny_student: Path, tmp_path: Path) -> None:
    settings = branch(
        tiny_student, tmp_path, "domain=math", "trainer.sample_every_n_steps=2", "trainer.sample_tokens=12"
    )
    folder = train(settings)
    lines = (tmp_path / "tiny" / "logs" / "train" / "math" / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    corpus = prepare(settings, read_branch(settings), load_tokenizer(tiny_student))
    document, tokenizer = corpus.documents[0], load_tokenizer(tiny_student)
    assert [row["step"] for row in rows] == [0, 2, 3] and {row["id"] for row in rows} == {document.id}
    prompt = torch.tensor(document.tokens[: document.prompt_len], dtype=torch.long)[None]
    for checkpoint, row in ((tiny_student, rows[0]), (folder, rows[-1])):
        model = load_model(checkpoint, torch.float32)
        out = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        answer = [token for token in out[0, prompt.shape[1] :].tolist() if token != tokenizer.eos_token_id]
        assert row["text"] == tokenizer.decode(answer)


@pytest.mark.parametrize("harm", [b"\0\0\0\n", b'{"step": 1}', b"[]\n"])
def test_damaged_samples_are_left_out(harm: bytes, tiny_student: Path, tmp_path: Path) -> None:
    """And what they say may hold characters that end lines elsewhere."""
    samples = Samples(load_tokenizer(tiny_student), Document("a", np.arange(3), 1), 1, 4, tmp_path, Ending())
    kept, later = (json.dumps({"step": step, "text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n" for step in (2, 5))
    samples.path.write_bytes((kept + later).encode() + harm)
    assert samples._lines_before(4) == [kept]


def test_flops_are_those_that_torch_counts(tiny_student: Path) -> None:
    """One document, so that attention is one square of which torch counts all and `Shapes` the causal half."""
    model = load_model(tiny_student, torch.float32, attention.PACKED_SDPA)
    shapes = Shapes.of(model)
    assert shapes is not None
    length = 40
    batch = make_batch([Document("a", np.arange(100, 100 + length), 1)], 1)
    with FlopCounterMode(display=False) as counted:
        summed_loss(model, batch).backward()
    seen = length * (length + 1) / 2
    products = counted.get_total_flops() - sum(
        flops for operator, flops in counted.get_flop_counts()["Global"].items() if "attention" in str(operator)
    )
    assert shapes.flops_of(batch) - 12 * shapes.attended * seen == pytest.approx(products, rel=1e-6)
    assert shapes.attended == 2 * 32


def test_layers_of_several_kinds_have_no_count() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"head_dim": 16, "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    config = AutoConfig.for_model("gemma4_text", intermediate_size=48, num_kv_shared_layers=0, **shape, **more)
    assert Shapes.of(AutoModelForCausalLM.from_config(config)) is None


@pytest.mark.parametrize(
    ("kind", "more", "windowed"),
    [
        ("mistral", {"sliding_window": 8}, 3),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, 2),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, 0),
        ("gemma2", {"sliding_window": 8, "head_dim": 16}, 2),
        ("llama", {}, 0),
    ],
)
def test_layers_that_look_back_over_a_window_count_only_what_they_see(
    kind: str, more: dict[str, Any], windowed: int
) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, intermediate_size=48, vocab_size=64, **shape, **more)
    shapes = Shapes.of(AutoModelForCausalLM.from_config(config))
    assert shapes is not None
    assert (shapes.attended, shapes.windowed) == ((3 - windowed) * 32, windowed * 32)
    everything = Shapes(shapes.matrices, shapes.head, 3 * 32)
    batch = make_batch([Document("a", np.arange(20), 1), Document("b", np.arange(5), 1)], 1)
    seen = torch.ones(20, 20).tril()
    unseen = seen.tril(-8).sum().item()  # of the first document; the window holds all of the other one
    assert everything.flops_of(batch) - shapes.flops_of(batch) == 12 * windowed * 32 * unseen


def test_two_documents_cost_less_than_one_of_their_length(tiny_student: Path) -> None:
    shapes = Shapes(matrices=1000, head=10, attended=64)
    one = make_batch([Document("a", np.arange(20), 1)], 1)
    two = make_batch([Document("a", np.arange(10), 1), Document("b", np.arange(10), 1)], 1)
    assert shapes.flops_of(one) == 6 * (1000 * 20 + 10 * 19) + 12 * 64 * 210
    assert shapes.flops_of(two) == 6 * (1000 * 20 + 10 * 18) + 12 * 64 * 110


def test_the_work_of_a_step_is_that_of_all_its_rows(tiny_student: Path, corpus: Corpus, tmp_path: Path) -> None:
    """On a CPU nothing is told of it, so its shapes are given."""
    shapes, told = Shapes(matrices=1000, head=10, attended=64), []

    class Counting(StepProgress):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            super().on_train_start(trainer, module)
            self._shapes = shapes

        def _said(self, trainer: Trainer, module: Student, step: int, flops: float) -> str:
            told.append(flops)
            return ""

    fitted(tiny_student, corpus, tmp_path, Counting("math", Console(file=io.StringIO())))
    rows = [[make_batch([corpus.documents[i] for i in row], 1) for row in step] for step in corpus.plan.steps]
    assert [len(step) for step in rows] == [2, 2, 2]
    assert told == [sum(shapes.flops_of(row) for row in step) for step in rows]


def test_devices_that_share_a_row_share_its_work(tiny_student: Path) -> None:
    module = Student(PackedLoss(load_model(tiny_student, torch.float32)), OptimConfig(), 1)
    progress, row = StepProgress("math"), make_batch([Document("a", np.arange(20), 1)], 1)
    progress._seen, progress._shapes = 0, Shapes(matrices=1000, head=10, attended=64)
    told = []
    for size in (1, 4):
        module.packed.context = SimpleNamespace(size=size)  # type: ignore[assignment]
        progress._flops = 0.0
        progress.on_train_batch_start(SimpleNamespace(global_step=0), module, row, 0)  # type: ignore[arg-type]
        told.append(progress._flops)
    assert told[0] == 4 * told[1] == progress._shapes.flops_of(row)


def test_the_time_left_is_reckoned_from_the_steps_of_this_run(tiny_student: Path) -> None:
    """Two steps in twenty seconds, after the ten of an earlier run."""
    module = Student(PackedLoss(load_model(tiny_student, torch.float32)), OptimConfig(), 22)
    trainer: Any = SimpleNamespace(callback_metrics={"tokens_per_second": 1.0, "loss": 1.0})
    progress = StepProgress("math")
    progress._first, progress._began = 10, time.monotonic() - 20
    assert progress._said(trainer, module, 12, 0.0).endswith("ETA 0:01:40")


def test_that_another_process_died_is_told_also_between_two_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Where no rows are in work, as while the student is validated or sampled."""
    trainer: Any = SimpleNamespace(global_step=4)
    module: Any = None
    error = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    StepRows(256).on_exception(trainer, module, error)
    said = "rank 0 failed after step 4 as it could not reach another rank: [gloo/transport/tcp/pair.cc:553] Connection"
    assert capsys.readouterr().err == f"{said} closed by peer\n"


def test_on_a_gpu_memory_and_utilisation_are_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no such device here, so what torch says of it is given."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    trainer: Any = SimpleNamespace(callback_metrics={"tokens_per_second": 100.0, "tokens": 200.0, "loss": 1.5})
    module: Any = SimpleNamespace(device=torch.device("cuda"), total_steps=4)
    progress = StepProgress("math")
    progress._first, progress._began = 0, time.monotonic() - 10
    said = progress._said(trainer, module, 2, 0.4 * 989e12 * 2)
    assert said == "step 2/4  loss 1.5000  100 tokens/s  3.0 GiB  MFU 40%  ETA 0:00:10"


def test_cards_are_known_by_torchs_names() -> None:
    known = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA L40S": 362e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10G": None, "NVIDIA GeForce RTX 4090": 165e12, "Tesla T4": None,
    }  # fmt: skip
    assert {card: peak_of(card) for card in known} == known
    assert utilisation(494.5e12, "NVIDIA H200") == "50%"
    assert utilisation(1e12, "Tesla T4") == utilisation(0, "NVIDIA H200") == "n/a"
