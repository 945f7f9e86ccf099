"""Held-out trajectories: who they are, that nobody trains on them, and that looking at them changes nothing."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from branches import branch, metrics
from test_resume import SETTINGS, expert, started, steps_saved, wait_for

from branchmerge.data.batch import make_batch, supervised_tokens
from branchmerge.data.datamodule import Corpus, prepare
from branchmerge.errors import UserError
from branchmerge.student import attention
from branchmerge.student.backbone import load_model, load_tokenizer
from branchmerge.student.loss import summed_loss
from branchmerge.student.training import train
from branchmerge.student.validation import packed, share
from branchmerge.study import read_manifest, weights_sha256
from branchmerge.trajectories.sources import read_branch

HELD_OUT = ("data.validation_rows=4", "trainer.validate_every_n_steps=2")
PARTS = ("math", "code", "science")


def corpus(student: Path, outputs: Path, *overrides: str) -> Corpus:
    settings = branch(student, outputs, *overrides)
    return prepare(settings, read_branch(settings), load_tokenizer(student))


def ids(found: Corpus) -> dict[str, list[str]]:
    return {part: [document.id for document in documents] for part, documents in found.held_out.items()}


def test_every_branch_holds_out_the_same_rows_and_trains_on_none(tiny_student: Path, tmp_path: Path) -> None:
    found = {
        domain: corpus(tiny_student, tmp_path, f"domain={domain}", "data.validation_rows=4")
        for domain in (*PARTS, "mixture", "warmup")
    }
    expected = ids(found["mixture"])
    assert {part: len(chosen) for part, chosen in expected.items()} == dict.fromkeys(PARTS, 4)
    for domain, one in found.items():
        held_out = ids(one)
        assert domain != "warmup" or len(held_out.pop("warmup")) == 4
        assert held_out == expected
        trained_on = {document.id for document in one.documents}
        assert not trained_on & {name for names in ids(one).values() for name in names}
        for source in one.account["sources"].values():
            assert source["read"] == source["kept"] + sum(source["dropped"].values())
            assert source["dropped"]["held_out"] == 4
    more = ids(corpus(tiny_student, tmp_path, "domain=math", "data.validation_rows=6"))
    assert all(more[part][:4] == expected[part] for part in PARTS)


def test_nothing_is_held_out_unless_asked(tiny_student: Path, tmp_path: Path) -> None:
    found = corpus(tiny_student, tmp_path, "domain=math")
    assert not found.held_out and "held_out" not in found.account


def test_other_answers_to_a_held_out_prompt_are_not_trained_on(tiny_student: Path, tmp_path: Path) -> None:
    rows = [
        {"id": f"{question}-{answer}", "messages": [
            {"role": "user", "content": f"Question {question}"}, {"role": "assistant", "content": f"Answer {answer}"}]}
        for question in range(5) for answer in range(4)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = corpus(tiny_student, tmp_path, "domain=math", f"data.path={file}", "data.validation_rows=2")
    assert set(found.held_out) == {"data.path", "code", "science"}
    held_out = {document.id.split("-")[0] for document in found.held_out["data.path"]}
    assert len(held_out) == 2
    assert {document.id.split("-")[0] for document in found.documents} == set("01234") - held_out
    assert len(found.documents) == 12
    with pytest.raises(UserError, match=r"data\.validation_rows=6: of 20 rows of data\.path only 5 can be held out"):
        corpus(tiny_student, tmp_path, "domain=math", f"data.path={file}", "data.validation_rows=6")


def test_right_rows_are_held_out_wherever_they_stand(tiny_student: Path, tmp_path: Path) -> None:
    def held_out(numbers: Sequence[int], wrong: set[int]) -> set[str]:
        rows = [
            {"id": f"{n}", "reference": {"grader": "math", "answer": f"{n}"}, "messages": [
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": f"\\boxed{{{n + 100 * (n in wrong)}}}"}]}
            for n in numbers
        ]  # fmt: skip
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = corpus(tiny_student, tmp_path, "domain=math", f"data.path={file}", "data.validation_rows=3")
        return {document.id for document in found.held_out["data.path"]}

    chosen = held_out(range(12), wrong=set())
    assert held_out(range(11, -1, -1), wrong=set()) == chosen != {"0", "1", "2"}
    first, *others = sorted(chosen)
    without = held_out(range(12), wrong={int(first)})
    assert len(without) == 3 and without & chosen == set(others)


def test_the_loss_is_that_of_the_documents_alone_and_falls(tiny_student: Path, tmp_path: Path) -> None:
    settings = branch(tiny_student, tmp_path, "domain=math", *HELD_OUT)
    folder = train(settings)
    rows = [row for row in metrics(tmp_path, "math") if row["val_loss/math"]]
    assert [int(row["step"]) for row in rows] == [0, 2, 3]
    found = corpus(tiny_student, tmp_path, "domain=math", *HELD_OUT)
    for checkpoint, row in ((tiny_student, rows[0]), (folder, rows[-1])):
        model = load_model(checkpoint, torch.float32, attention.PACKED_SDPA).eval()
        for part, documents in found.held_out.items():
            with torch.no_grad():
                total = sum(float(summed_loss(model, make_batch([document], 1))) for document in documents)
            expected = total / sum(map(supervised_tokens, documents))
            assert float(row[f"val_loss/{part}"]) == pytest.approx(expected, rel=1e-5)
    assert float(rows[-1]["val_loss/math"]) < float(rows[0]["val_loss/math"])
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.data["held_out"] == dict.fromkeys(PARTS, 4)
    assert manifest.work["data"]["validation_rows"] == 4
    assert len([row for row in metrics(tmp_path, "math") if row["loss"]]) == 3


def test_it_is_computed_as_precisely_as_the_training(tiny_student: Path, tmp_path: Path) -> None:
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        train(branch(tiny_student, tmp_path / precision, *HELD_OUT, "domain=math", f"trainer.precision={precision}"))
        losses.append(float(metrics(tmp_path / precision, "math")[0]["val_loss/code"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[1] != pytest.approx(losses[0], rel=1e-6)


def test_validating_and_sampling_change_no_bit_of_the_training(tiny_student: Path, tmp_path: Path) -> None:
    """Dropout in the student, so that a random number taken by the way would show."""
    config = json.loads((tiny_student / "config.json").read_text())
    student = tmp_path / "dropout"
    student.mkdir()
    for file in tiny_student.iterdir():
        (student / file.name).write_bytes(file.read_bytes())
    (student / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    often = ("trainer.validate_every_n_steps=1", "trainer.sample_every_n_steps=1", "trainer.sample_tokens=4")
    folders = [
        train(branch(student, tmp_path / name, "domain=math", "data.validation_rows=4", *more))
        for name, more in (("seldom", ()), ("often", often))
    ]
    assert weights_sha256(folders[0]) == weights_sha256(folders[1])
    curves = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(tmp_path / name, "math") if row["loss"]]
        for name in ("seldom", "often")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 3


def test_all_processes_get_as_many_rows_and_every_row_once(tiny_student: Path, tmp_path: Path) -> None:
    documents = corpus(tiny_student, tmp_path, "domain=math", "data.validation_rows=7").held_out["math"]
    rows = packed(documents, 256)
    assert len(rows) > 1 and packed(documents, 256) == rows
    for world in (1, 2, 3, 5):
        shares = [share(rows, rank, world) for rank in range(world)]
        assert len({len(batches) for batches in shares}) == 1
        seen = [name for batches in shares for batch in batches if batch.supervised for name in batch.ids]
        assert sorted(seen) == sorted(document.id for document in documents)


def test_validating_without_held_out_rows_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no rows are held out .* give data\.validation_rows="):
        branch(tiny_student, tmp_path, "domain=math", "trainer.validate_every_n_steps=2")


def test_a_killed_branch_goes_on_with_its_validation_curve_and_samples(tiny_student: Path, tmp_path: Path) -> None:
    watched = (*HELD_OUT, "trainer.sample_every_n_steps=3", "trainer.sample_tokens=4")
    train(branch(tiny_student, tmp_path / "whole", *SETTINGS, *watched))
    cut = tmp_path / "cut"
    process = started(tiny_student, cut, *watched)
    wait_for(lambda: steps_saved(cut), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not expert(cut).exists()
    train(branch(tiny_student, cut, *SETTINGS, *watched))
    names = ("step", "loss", *(f"val_loss/{part}" for part in PARTS))
    curves = [
        sorted(tuple(row[name] for name in names) for row in metrics(outputs, "math"))
        for outputs in (tmp_path / "whole", cut)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 20 + 11
    samples = [
        (outputs / "tiny" / "logs" / "train" / "math" / "samples.jsonl").read_text()
        for outputs in (tmp_path / "whole", cut)
    ]
    assert samples[0] == samples[1]
    assert [json.loads(line)["step"] for line in samples[0].splitlines()] == [0, 3, 6, 9, 12, 15, 18, 20]
