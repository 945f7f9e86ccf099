import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from branchmerge.data.batch import IGNORE, make_batch, make_idle_batch, supervised_tokens
from branchmerge.data.template import Document

A = Document("a", np.array((10, 11, 12, 13)), prompt_len=2)
B = Document("b", np.array((20, 21, 22)), prompt_len=1)


@st.composite
def rows(draw: st.DrawFn) -> list[Document]:
    """Documents whose tokens are all different, so that a token tells where it stands."""
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
    return [
        Document(str(number), np.arange(100 * number, 100 * number + length), draw(st.integers(0, length)))
        for number, length in enumerate(lengths, start=1)
    ]


def test_documents_lie_one_after_the_other() -> None:
    batch = make_batch([A, B], 0)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 20, 21, 22]]
    assert batch.ids == ["a", "b"]


def test_labels_are_the_next_tokens_of_the_response_and_nothing_else() -> None:
    assert make_batch([A, B], 0).labels.tolist() == [[IGNORE, 12, 13, IGNORE, 21, 22, IGNORE]]


def test_learned_are_the_places_of_labels() -> None:
    batch = make_batch([A, B], 0)
    assert batch.learned.tolist() == [1, 2, 4, 5] and batch.learned.dtype == torch.int64
    assert batch.targets.tolist() == [12, 13, 21, 22]
    idle = make_idle_batch([A, B], 0)
    assert (idle.learned.tolist(), idle.supervised, set(idle.labels[0].tolist())) == ([], 0, {IGNORE})


def test_positions_restart_with_every_document() -> None:
    assert make_batch([A, B], 0).position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_cu_seq_lens_mark_the_borders() -> None:
    batch = make_batch([A, B], 0)
    assert batch.cu_seq_lens.tolist() == [0, 4, 7]
    assert (batch.lengths, batch.max_length) == ((4, 3), 4)


def test_types_are_those_that_models_and_flash_attention_take() -> None:
    batch = make_batch([A, B], 0)
    assert [t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids)] == [torch.int64] * 3
    assert batch.cu_seq_lens.dtype == torch.int32


def test_supervised_counts_of_row_and_step() -> None:
    batch = make_batch([A, B], 17)
    assert (batch.supervised, batch.supervised_in_step) == (4, 17)


def test_prompt_alone_teaches_nothing() -> None:
    document = Document("p", np.array((1, 2, 3)), prompt_len=3)
    assert supervised_tokens(document) == make_batch([document], 0).supervised == 0


def test_first_token_is_never_learned_even_without_prompt() -> None:
    """Nothing stands before it to predict it from."""
    document = Document("p", np.array((1, 2, 3)), prompt_len=0)
    assert make_batch([document], 0).labels.tolist() == [[2, 3, IGNORE]]
    assert supervised_tokens(document) == 2


@given(rows())
def test_no_label_crosses_documents_or_lies_in_a_prompt(documents: list[Document]) -> None:
    batch = make_batch(documents, 0)
    by_number = {int(document.id): document for document in documents}
    for token, label in zip(batch.input_ids[0].tolist(), batch.labels[0].tolist(), strict=True):
        if label != IGNORE:
            assert label == token + 1
            assert label % 100 >= by_number[label // 100].prompt_len
            assert label // 100 == token // 100


@given(rows())
def test_every_response_token_is_learned_once(documents: list[Document]) -> None:
    learned = [label for label in make_batch(documents, 0).labels[0].tolist() if label != IGNORE]
    assert learned == [token for document in documents for token in document.tokens[max(document.prompt_len, 1) :]]
    assert len(learned) == sum(supervised_tokens(document) for document in documents)


@given(rows())
def test_shapes_and_borders_agree(documents: list[Document]) -> None:
    batch = make_batch(documents, 0)
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, sum(map(len, documents)))
    starts = batch.position_ids[0].eq(0).nonzero().flatten().tolist()
    assert batch.cu_seq_lens.tolist() == [*starts, batch.input_ids.shape[1]]
    assert batch.max_length == int(batch.cu_seq_lens.diff().max()) == int(batch.position_ids.max()) + 1
