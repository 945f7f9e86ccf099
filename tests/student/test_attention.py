"""A packed row equals its documents alone: the claim that all of packing rests on."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_student
from torch.nn.attention.flex_attention import create_block_mask

from branchmerge.data.batch import Batch, make_batch
from branchmerge.data.template import Document
from branchmerge.errors import UserError
from branchmerge.student import attention, flash
from branchmerge.student.backbone import load_model
from branchmerge.student.loss import PackedLoss, packed_logits

LENGTHS = (7, 1, 30, 12)


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Document(f"d{i}", np.array(tokens), 1) for i, tokens in enumerate(ids)]


def everywhere(batch: Batch) -> torch.Tensor:
    return torch.arange(batch.input_ids.shape[1])


MODELS: dict[str, dict[str, float]] = {
    "llama": {}, "qwen2": {}, "qwen3": {},
    # Windows shorter than most of the documents; FlexAttention, which has them on a GPU, takes heads of 16 and more.
    "mistral": {"sliding_window": 5, "head_dim": 16},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "head_dim": 16},
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_of_a_packed_row_equal_those_of_the_documents_alone(model_type: str, tmp_path: Path) -> None:
    folder = make_student(tmp_path / model_type, model_type=model_type, **MODELS[model_type])
    model = load_model(folder, torch.float32, attention.PACKED_SDPA).eval()
    plain = load_model(folder, torch.float32, "eager").eval()
    packed = make_batch(documents(), 1)
    with torch.no_grad():
        together = packed_logits(model, packed, everywhere(packed))
        alone = torch.cat([plain(torch.tensor(document.tokens)[None]).logits[0] for document in documents()])
    assert float(alone.std()) > 0.5  # the logits are far from zero, so that agreeing means something
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_ordinary_attention_over_the_same_row_would_mix_documents(tiny_student: Path) -> None:
    """The control of the test above: without cu_seq_lens the second document sees the first."""
    model = load_model(tiny_student, torch.float32, "sdpa").eval()
    tokens = [token for document in documents() for token in document.tokens]
    with torch.no_grad():
        mixed = model(torch.tensor([tokens])).logits[0]
        alone = torch.cat([model(torch.tensor(document.tokens)[None]).logits[0] for document in documents()])
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


def heads(tokens: int, requires_grad: bool = False) -> list[torch.Tensor]:
    """Query, key and value of four heads, two of keys, each of size 16, which is the least that FlexAttention takes."""
    draw = torch.Generator().manual_seed(7)
    made = [torch.randn(1, count, tokens, 16, generator=draw) for count in (4, 2, 2)]
    return [tensor.requires_grad_(requires_grad) for tensor in made]


LIMITS = pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (5, None), (None, 2.0), (5, 2.0)], ids=["plain", "window", "capped", "both"]
)


@LIMITS
def test_the_formula_is_that_of_a_mask_written_out(window: int | None, softcap: float | None) -> None:
    q, k, v = heads(12)
    k4, v4 = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
    scores = torch.einsum("bhte,bhse->bhts", q, k4) * 0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    for t in range(12):
        for s in range(12):
            if s > t or (window and t - s >= window):
                scores[:, :, t, s] = -torch.inf
    expected = torch.einsum("bhts,bhse->bhte", scores.softmax(-1), v4)
    torch.testing.assert_close(attention.by_formula(q, k, v, 0.5, window, softcap), expected)


@LIMITS
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_formula_in_every_document(window: int | None, softcap: float | None) -> None:
    q, k, v = heads(sum(LENGTHS))
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    expected = [
        attention.by_formula(*(tensor[:, :, start:end] for tensor in (q, k, v)), 0.5, window, softcap)
        for start, end in pairwise(bounds.tolist())
    ]
    found = attention._flex(q, k, v, bounds, 0.5, window, softcap)
    torch.testing.assert_close(found, torch.cat(expected, dim=2).transpose(1, 2))


@pytest.mark.parametrize("window", [None, 1, 100, 129, 300])
def test_flex_attentions_blocks_are_those_of_its_own_way(window: int | None) -> None:
    """Which looks at every pair of tokens."""
    draw = torch.Generator().manual_seed(3)
    for _ in range(10):
        lengths = torch.randint(1, 500, (int(torch.randint(1, 6, (), generator=draw)),), generator=draw)
        bounds = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
        tokens = int(bounds[-1])
        found = attention._blocks(bounds, tokens, window)
        own = create_block_mask(found.mask_mod, None, None, tokens, tokens, device="cpu")
        assert torch.equal(found.to_dense(), own.to_dense())
        assert found.shape == own.shape
        for blocks in (found, own):
            assert blocks.full_kv_num_blocks is not None and blocks.full_kv_indices is not None
        assert torch.equal(found.kv_num_blocks, own.kv_num_blocks)
        assert torch.equal(found.full_kv_num_blocks, own.full_kv_num_blocks)
        assert torch.equal(found.full_kv_indices, own.full_kv_indices)


def test_gradients_reach_past_no_window() -> None:
    q, k, v = heads(20, requires_grad=True)
    bounds = torch.tensor([0, 8, 20], dtype=torch.int32)
    module = torch.nn.Module()
    out, _ = attention.packed_sdpa(
        module, q, k, v, None, cu_seq_lens_q=bounds, max_length_q=12, sliding_window=3, softcap=4.0
    )
    out[0, 15].sum().backward()
    assert v.grad is not None
    touched = v.grad[0].abs().sum((0, 2)) > 0
    assert touched.nonzero()[:, 0].tolist() == [13, 14, 15]


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bfloat16_short_documents_are_float32s_rounded_once(autocast: bool) -> None:
    """With autocast queries and keys are still in float32, as rotary embeddings leave them; sharded they are not."""
    bounds = torch.tensor([0, 40, 40 + 2 * attention.SHORT], dtype=torch.int32)
    made = heads(int(bounds[-1]))
    q, k, v = made if autocast else [tensor.bfloat16() for tensor in made]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = attention.packed_sdpa(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds)
    exact, _ = attention.packed_sdpa(torch.nn.Module(), q.float(), k.float(), v.float(), None, cu_seq_lens_q=bounds)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, :40], exact[:, :40].bfloat16())
    assert not torch.equal(found[:, 40:], exact[:, 40:].bfloat16())
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)


def test_what_is_no_packed_row_is_refused() -> None:
    q = torch.zeros(1, 2, 4, 8)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="cu_seq_lens"):
        attention.packed_sdpa(module, q, q, q, None)
    with pytest.raises(ValueError, match="without attention_mask"):
        attention.packed_sdpa(module, q, q, q, torch.ones(1, 1, 4, 4), cu_seq_lens_q=bounds)
    with pytest.raises(ValueError, match="takes no cache: 8 keys for 4 queries"):
        longer = torch.zeros(1, 2, 8, 8)
        attention.packed_sdpa(module, q, longer, longer, None, cu_seq_lens_q=bounds)
    with pytest.raises(UserError, match="Module: attention with sinks"):
        attention.packed_sdpa(module, q, q, q, None, cu_seq_lens_q=bounds, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="one row"):
        attention.packed_sdpa(module, *[q.expand(2, -1, -1, -1)] * 3, None, cu_seq_lens_q=bounds)


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((9, 0), (2, 3, 4), attention.PACKED_FLASH[4]),
        ((9, 0), (2, 3), attention.PACKED_FLASH[3]),
        ((9, 0), (2,), attention.PACKED_FLASH[2]),
        ((10, 0), (2, 3), attention.PACKED_FLASH[2]),
        ((8, 0), (2, 3, 4), attention.PACKED_FLASH[2]),
        ((8, 0), (), attention.PACKED_SDPA),
        ((7, 5), (2,), attention.PACKED_SDPA),
    ],
)
def test_auto_takes_the_newest_flash_attention_made_for_the_device(
    capability: tuple[int, int], installed: tuple[int, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no such device here, so what torch and transformers say of it is given."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(flash, "is_installed", lambda version: version in installed)
    cuda = torch.device("cuda")
    assert attention.implementation("auto", cuda, torch.bfloat16) == expected
    assert attention.implementation("auto", cuda, torch.float32) == attention.PACKED_SDPA
    assert attention.implementation("auto", cuda, torch.bfloat16, shared=True) == attention.PACKED_SDPA
    assert attention.implementation("auto", torch.device("cpu"), torch.bfloat16) == attention.PACKED_SDPA


def test_flash_attention_that_is_named_needs_half_precision_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "is_installed", lambda version: version == 2)
    cuda = torch.device("cuda")
    assert attention.implementation("flash_attention_2", cuda, torch.bfloat16) == attention.PACKED_FLASH[2]
    with pytest.raises(UserError, match=r"backbone\.attn=flash_attention_3: that version of flash-attn"):
        attention.implementation("flash_attention_3", cuda, torch.bfloat16)
    with pytest.raises(UserError, match=r"backbone\.attn=flash_attention_2: it has no float32"):
        attention.implementation("flash_attention_2", cuda, torch.float32)
    with pytest.raises(UserError, match="the package flash-attn-4 is not installed"):
        attention.implementation("flash_attention_4", cuda, torch.bfloat16)


def test_a_mask_is_refused_through_a_model_too(tiny_student: Path) -> None:
    """transformers would hand on no mask of padding to the attention, where it knows of none that it needs."""
    model = load_model(tiny_student, torch.float32, attention.PACKED_SDPA)
    PackedLoss(model)
    ids, bounds = torch.arange(8)[None], torch.tensor([0, 8], dtype=torch.int32)
    packed = {"input_ids": ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "use_cache": False}
    assert model(**packed, attention_mask=None).logits.shape[1] == 8
    for mask in (torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 1, 8, 8, dtype=torch.bool)):
        with pytest.raises(ValueError, match="without attention_mask"):
            model(**packed, attention_mask=mask)
    with pytest.raises(ValueError, match="cu_seq_lens"):
        model(input_ids=ids, use_cache=False)
