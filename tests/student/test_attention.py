"""A packed row equals its documents alone: the claim that all of packing rests on."""

from pathlib import Path

import pytest
import torch
from conftest import make_student

from branchmerge.data.batch import Batch, make_batch
from branchmerge.data.template import Document
from branchmerge.student import attention
from branchmerge.student.backbone import load_model
from branchmerge.student.loss import packed_logits

LENGTHS = (7, 1, 30, 12)


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Document(f"d{i}", tuple(tokens), 1) for i, tokens in enumerate(ids)]


def everywhere(batch: Batch) -> torch.Tensor:
    return torch.arange(batch.input_ids.shape[1])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_logits_of_a_packed_row_equal_those_of_the_documents_alone(model_type: str, tmp_path: Path) -> None:
    folder = make_student(tmp_path / model_type, model_type=model_type)
    model = load_model(folder, torch.float32, attention.PACKED_SDPA).eval()
    plain = load_model(folder, torch.float32, "eager").eval()
    packed = make_batch(documents(), 1)
    with torch.no_grad():
        together = packed_logits(model, packed, everywhere(packed))
        alone = torch.cat([plain(torch.tensor([document.tokens])).logits[0] for document in documents()])
    assert float(alone.std()) > 0.5  # the logits are far from zero, so that agreeing means something
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_ordinary_attention_over_the_same_row_would_mix_documents(tiny_student: Path) -> None:
    """The control of the test above: without cu_seq_lens the second document sees the first."""
    model = load_model(tiny_student, torch.float32, "sdpa").eval()
    tokens = [token for document in documents() for token in document.tokens]
    with torch.no_grad():
        mixed = model(torch.tensor([tokens])).logits[0]
        alone = torch.cat([model(torch.tensor([document.tokens])).logits[0] for document in documents()])
    assert float((mixed - alone)[LENGTHS[0] :].abs().max()) > 0.1


def test_only_the_asked_positions_go_through_the_head(tiny_student: Path) -> None:
    model = load_model(tiny_student, torch.float32, attention.PACKED_SDPA).eval()
    batch = make_batch(documents(), 1)
    places = torch.tensor([3, 20, 49])
    with torch.no_grad():
        some, whole = packed_logits(model, batch, places), packed_logits(model, batch, everywhere(batch))
    assert some.shape == (3, 512)
    torch.testing.assert_close(some, whole[places])


def test_gradients_do_not_cross_documents(tiny_student: Path) -> None:
    model = load_model(tiny_student, torch.float32, attention.PACKED_SDPA)
    batch = make_batch(documents(), 1)
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    bounds = batch.cu_seq_lens
    output = model.model(
        inputs_embeds=embedded, position_ids=batch.position_ids, use_cache=False,
        cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=batch.max_length, max_length_k=batch.max_length,
    ).last_hidden_state  # fmt: skip
    start, end = int(bounds[2]), int(bounds[3])
    output[0, start:end].square().sum().backward()
    assert embedded.grad is not None
    touched = embedded.grad[0].abs().sum(-1) > 0
    assert touched[start:end].all() and not touched[:start].any() and not touched[end:].any()


def test_what_it_cannot_compute_is_refused() -> None:
    q = torch.zeros(1, 2, 4, 8)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="cu_seq_lens"):
        attention.packed_sdpa(module, q, q, q, None)
    with pytest.raises(ValueError, match="without attention_mask"):
        attention.packed_sdpa(module, q, q, q, torch.ones(1, 1, 4, 4), cu_seq_lens_q=bounds)
    with pytest.raises(ValueError, match="window"):
        attention.packed_sdpa(module, q, q, q, None, cu_seq_lens_q=bounds, max_length_q=4, sliding_window=2)
    with pytest.raises(ValueError, match="soft-capping"):
        attention.packed_sdpa(module, q, q, q, None, cu_seq_lens_q=bounds, max_length_q=4, softcap=30.0)


def test_auto_takes_sdpa_on_the_cpu() -> None:
    assert attention.implementation("auto", torch.device("cpu")) == attention.PACKED_SDPA
    assert attention.implementation("flash_attention_2", torch.device("cuda")) == "flash_attention_2"
