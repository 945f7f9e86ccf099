"""The attention of single new tokens equals transformers' own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from branchmerge.data.template import render_prompt
from branchmerge.evaluation.decode_attention import DECODE_SDPA, decode_sdpa
from branchmerge.student.backbone import load_model, load_tokenizer
from branchmerge.trajectories.schema import Message

B, T, E = 3, 11, 8


class Layer(nn.Module):
    """What transformers' function reads of an attention layer."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def drawn(heads: int, kv_heads: int, queries: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shapes = ((B, heads, queries, E), (B, kv_heads, T, E), (B, kv_heads, T, E))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def left_padding(lengths: tuple[int, ...]) -> Tensor:
    """True where a token may be looked at: [B, 1, 1, T]."""
    return torch.stack([torch.arange(T) >= T - length for length in lengths])[:, None, None]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (9, 3), (4, 1)])
@pytest.mark.parametrize("mask", [None, left_padding((T, 4, 1))], ids=["whole", "padded"])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_one_query_equals_sdpa(heads: int, kv_heads: int, mask: Tensor | None, scaling: float | None) -> None:
    layer, tensors = Layer(heads // kv_heads), drawn(heads, kv_heads)
    found, _ = decode_sdpa(layer, *tensors, mask, scaling=scaling)
    expected, _ = sdpa_attention_forward(layer, *tensors, mask, scaling=scaling)
    assert found.shape == (B, 1, heads, E)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_values_may_have_another_size_than_keys() -> None:
    query, key, value = drawn(4, 2)
    mask = left_padding((T, 4, 1))
    found, _ = decode_sdpa(Layer(2), query, key, value[..., :5], mask)
    assert found.shape == (B, 1, 4, 5)
    torch.testing.assert_close(found, decode_sdpa(Layer(2), query, key, value, mask)[0][..., :5])


@pytest.mark.parametrize("of_heads", [1, 4])
def test_a_mask_of_numbers_is_added_to_the_scores(of_heads: int) -> None:
    layer, tensors = Layer(2), drawn(4, 2)
    mask = torch.randn(B, of_heads, 1, T, generator=torch.Generator().manual_seed(3))
    found, _ = decode_sdpa(layer, *tensors, mask)
    expected, _ = sdpa_attention_forward(layer, *tensors, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_is_masked_has_no_weight() -> None:
    query, key, value = drawn(4, 2)
    mask = left_padding((T, 4, 1))
    spoiled = torch.where(mask.mT, value, 1e6)
    whole, _ = decode_sdpa(Layer(2), query, key, value, mask)
    again, _ = decode_sdpa(Layer(2), query, key, spoiled, mask)
    assert torch.equal(whole, again)


def test_several_queries_are_sdpas_own() -> None:
    tensors = drawn(4, 2, queries=T)
    found, _ = decode_sdpa(Layer(2), *tensors, None)
    expected, _ = sdpa_attention_forward(Layer(2), *tensors, None)
    assert torch.equal(found, expected)


def test_bfloat16_stays_and_is_near_float32() -> None:
    mask = left_padding((T, 4, 1))
    exact, _ = decode_sdpa(Layer(2), *drawn(4, 2), mask)
    query, key, value = (tensor.bfloat16() for tensor in drawn(4, 2))
    rounded, _ = decode_sdpa(Layer(2), query, key, value, mask)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


def test_greedy_generation_with_left_padding_is_the_same(tiny_student: Path) -> None:
    tokenizer = load_tokenizer(tiny_student)
    questions = ["What is 12 * 7?", "Write a Python function f(x) that adds 28 to x and then multiplies by 5.", "?"]
    prompts = [render_prompt(tokenizer, [Message("user", question)]) for question in questions]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
    assert 0 < int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
    said = []
    for attention in ("sdpa", DECODE_SDPA):
        model = load_model(tiny_student, torch.float32, attention)
        assert model.config._attn_implementation == attention
        said.append(
            model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                do_sample=False, min_new_tokens=24, max_new_tokens=24,
            )
        )  # fmt: skip
    assert said[0].shape[1] == batch["input_ids"].shape[1] + 24
    assert torch.equal(*said)
