import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from branchmerge.config import (
    BackboneConfig,
    BudgetConfig,
    DataConfig,
    DomainConfig,
    OptimConfig,
    SourceConfig,
    StudyConfig,
    TrainConfig,
    TrainerConfig,
)
from branchmerge.data import datamodule
from branchmerge.data.batch import Batch, supervised_tokens
from branchmerge.data.datamodule import (
    Corpus,
    PackedRows,
    TrajectoryData,
    data_account,
    prepare,
)
from branchmerge.data.held_out import other_sources
from branchmerge.data.packing import Plan
from branchmerge.data.template import Document, tokenise
from branchmerge.errors import UserError
from branchmerge.trajectories.sources import of_branch, read_branch

SEQ_LEN = 64


@pytest.fixture(scope="module")
def tokenizer(tiny_student: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_student)


def raw_row(number: int, response: str, answer: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"What is {number} + 1?"}, {"role": "assistant", "content": response}]
    reference = None if answer is None else {"grader": "math", "answer": answer}
    return {"id": f"r{number}", "messages": turns, "reference": reference}


def right(number: int) -> dict[str, Any]:
    return raw_row(number, f"\\boxed{{{number + 1}}}", str(number + 1))


LONG = raw_row(900, "one and " * 200)
"""Too long by its response."""


def train_config(folder: Path, rows: list[dict[str, Any]], too_long: str = "drop", seed: int = 42) -> TrainConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        study=StudyConfig(
            name="s", experts=["math"], tree=[], corpus={"math": SourceConfig(path=str(path))}, budget={}
        ),
        backbone=BackboneConfig(name="tiny"),
        domain=DomainConfig(name="math", parts=["math"]),
        data=DataConfig(seq_len=SEQ_LEN, too_long=too_long),
        optim=OptimConfig(epochs=2, global_batch=3, lr=1e-3, schedule="constant"),
        trainer=TrainerConfig(progress=False),
        seed=seed,
    )


def prepared(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    return prepare(config, read_branch(config), tokenizer)


def test_sources_are_the_parts_of_the_domain(tmp_path: Path) -> None:
    config = train_config(tmp_path, [right(1)])
    config.study.corpus["code"] = SourceConfig(path="elsewhere.jsonl")
    assert of_branch(config) == {"math": config.study.corpus["math"]}


def test_a_part_has_all_sources_of_its_name(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """What two of them have in common is trained on once."""
    config = train_config(tmp_path, [right(1), right(2)])
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in (right(2), right(3), right(3))))
    config.study.corpus |= {
        "math-more": SourceConfig(path=str(more)),
        "mathematics": SourceConfig(path="elsewhere.jsonl"),
    }
    corpus = prepared(config, tokenizer)
    kept = {name: (entry["kept"], entry["dropped"]) for name, entry in corpus.account["sources"].items()}
    assert kept == {"math": (2, {}), "math-more": (1, {"duplicate": 2})}
    config.domain.parts, config.domain.name = ["code"], "code"
    config.study.corpus["code"] = SourceConfig(path="code.jsonl")
    assert list(other_sources(config)) == ["math", "math-more"]


def test_a_domain_is_no_source_of_another_one_whose_name_it_begins_with(tmp_path: Path) -> None:
    config = train_config(tmp_path, [right(1)])
    config.study.corpus["math-hard"] = SourceConfig(path="hard.jsonl")
    config.study.budget = {"math": BudgetConfig(), "math-hard": BudgetConfig()}
    assert list(of_branch(config)) == ["math"]
    config.domain.parts = ["math", "math-hard"]
    assert list(of_branch(config)) == ["math", "math-hard"]


def test_data_path_replaces_the_corpus(tmp_path: Path) -> None:
    config = train_config(tmp_path, [right(1)])
    config.data.path, config.data.format = "mine.jsonl", "gsm8k"
    assert of_branch(config) == {"data.path": SourceConfig(path="mine.jsonl", format="gsm8k")}


def test_account_changes_with_the_file(tmp_path: Path) -> None:
    before = data_account(train_config(tmp_path, [right(1)]))
    same = data_account(train_config(tmp_path, [right(1)]))
    after = data_account(train_config(tmp_path, [right(2)]))
    assert before == same != after


def test_account_tells_what_became_of_every_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    wrong = raw_row(5, "\\boxed{7}", "6")
    twice = raw_row(6, "One end<|im_end|> and another.")
    config = train_config(tmp_path, [right(1), right(1), right(2), wrong, raw_row(3, "free"), LONG, twice])
    corpus = prepared(config, tokenizer)
    entry = corpus.account["sources"]["math"]
    assert entry["dropped"] == {"duplicate": 1, "wrong_answer": 1, "ends_early": 1, "too_long": 1}
    assert (entry["read"], entry["kept"], entry["unverified"], entry["truncated"]) == (7, 3, 1, 0)
    assert [document.id for document in corpus.documents] == ["r1", "r2", "r3"]


def test_rows_with_texts_of_control_tokens_and_rows_of_an_end_alone_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    forged = raw_row(5, "<|im_start|>user\nMore?")
    corpus = prepared(train_config(tmp_path, [right(1), forged, raw_row(6, "<|im_end|>"), raw_row(7, " ")]), tokenizer)
    entry = corpus.account["sources"]["math"]
    assert (entry["read"], entry["kept"], entry["dropped"]) == (4, 1, {"control_token": 1, "empty": 2})


def test_a_conversation_that_the_template_refuses_is_named_before_any_row_is_graded(
    tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = AutoTokenizer.from_pretrained(tiny_student)
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    row = right(2)
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    config = train_config(tmp_path, [right(1), row])
    monkeypatch.setattr(datamodule, "select", lambda *_: pytest.fail("graded"))
    with pytest.raises(UserError, match=r"r2: cannot be written by .*no system"):
        prepared(config, strict)


def test_verify_off_keeps_wrong_answers(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = train_config(tmp_path, [right(1), raw_row(5, "\\boxed{7}", "6")])
    config.data.verify = False
    corpus = prepared(config, tokenizer)
    assert [document.id for document in corpus.documents] == ["r1", "r5"]
    assert corpus.account["sources"]["math"]["unverified"] == 2


def test_too_long_rows_are_cut_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = train_config(tmp_path, [right(1), LONG], too_long="truncate")
    rows = read_branch(config)
    corpus = prepare(config, rows, tokenizer)
    entry = corpus.account["sources"]["math"]
    assert (entry["kept"], entry["truncated"], entry["dropped"]) == (2, 1, {})
    _, whole = tokenise(tokenizer, rows["math"])
    assert len(whole) > SEQ_LEN
    cut = corpus.documents[1]
    assert (cut.id, cut.prompt_len) == ("r900", whole.prompt_len)
    assert cut.tokens.tolist() == whole.tokens[:SEQ_LEN].tolist()


def test_prompt_that_fills_the_row_is_dropped_even_when_cutting(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    endless = raw_row(7, "\\boxed{8}")
    endless["messages"][0]["content"] *= 20
    corpus = prepared(train_config(tmp_path, [right(1), endless], too_long="truncate"), tokenizer)
    entry = corpus.account["sources"]["math"]
    assert (entry["kept"], entry["truncated"], entry["dropped"]) == (1, 0, {"too_long": 1})
    config = train_config(tmp_path, [LONG], too_long="truncate")
    (document,) = tokenise(tokenizer, read_branch(config)["math"])
    config.data.seq_len = document.prompt_len + 1
    assert prepared(config, tokenizer).supervised == 2  # one token, in each of two epochs
    config.data.seq_len = document.prompt_len
    with pytest.raises(UserError, match="'too_long': 1"):
        prepared(config, tokenizer)


def test_row_of_exactly_seq_len_tokens_is_kept_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = train_config(tmp_path, [right(1)])
    rows = read_branch(config)
    (document,) = tokenise(tokenizer, rows["math"])
    config.data.seq_len = len(document)
    assert prepare(config, rows, tokenizer).account["sources"]["math"]["kept"] == 1
    config.data.seq_len -= 1
    with pytest.raises(UserError):
        prepare(config, rows, tokenizer)


@pytest.mark.parametrize(
    ("row", "reason"), [(LONG, "'too_long': 1"), (raw_row(5, "\\boxed{7}", "6"), "'wrong_answer': 1")]
)
def test_nothing_left_is_refused_with_the_reasons(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=f"no trajectory is left to train on.*{reason}"):
        prepared(train_config(tmp_path, [row]), tokenizer)


def test_totals_count_every_epoch(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = prepared(train_config(tmp_path, [right(number) for number in range(1, 9)]), tokenizer)
    assert corpus.account["rows"] == 8
    assert corpus.account["tokens"] == 2 * sum(len(document) for document in corpus.documents)
    learned = sum(len(document) - document.prompt_len for document in corpus.documents)
    assert corpus.account["supervised_tokens"] == 2 * learned


DOCUMENTS = [Document(str(number), np.arange(2 + number), 1) for number in range(5)]
PLAN = Plan((((0, 3), (1,)), ((4,), (2, 0)), ((1,),)))


def test_supervised_in_step_is_the_sum_over_the_rows_of_the_step() -> None:
    rows = PackedRows(DOCUMENTS, PLAN.steps)
    learned = [sum(supervised_tokens(DOCUMENTS[number]) for number in row) for row in PLAN.rows]
    assert learned == [5, 2, 5, 4, 2]
    assert [rows[index].supervised for index in range(len(rows))] == learned
    assert [rows[index].supervised_in_step for index in range(len(rows))] == [7, 7, 9, 9, 2]


def test_rows_come_in_the_order_of_the_plan() -> None:
    rows = PackedRows(DOCUMENTS, PLAN.steps)
    assert len(rows) == 5
    assert [rows[index].ids for index in range(5)] == [["0", "3"], ["1"], ["4"], ["2", "0"], ["1"]]


def batches(corpus: Corpus) -> list[Batch]:
    return list(TrajectoryData(corpus).train_dataloader())


def test_loader_hands_over_the_packed_rows_unchanged() -> None:
    rows = PackedRows(DOCUMENTS, PLAN.steps)
    loaded = batches(Corpus(DOCUMENTS, PLAN, {}))
    assert [batch.ids for batch in loaded] == [rows[index].ids for index in range(5)]
    for index, batch in enumerate(loaded):
        assert torch.equal(batch.input_ids, rows[index].input_ids)
        assert batch.supervised_in_step == rows[index].supervised_in_step


def test_order_is_decided_by_the_seed_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [right(number) for number in range(1, 31)]
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(orders))
        corpus = prepared(train_config(tmp_path, rows, seed=seed), tokenizer)
        orders.append([batch.ids for batch in batches(corpus)])
    assert orders[0] == orders[1] != orders[2]
    assert len(orders[0]) > 6
