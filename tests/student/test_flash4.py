"""What surrounds FlashAttention 4's kernels: the formula is in their place, as those need a GPU (training_on_gpu)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from branchmerge.student import attention, flash4
from branchmerge.student.attention import PACKED_FLASH, PACKED_SDPA, by_formula
from branchmerge.student.backbone import head_shape
from branchmerge.student.trials import choose_attention

LENGTHS = (7, 1, 130, 700)
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
BOUNDS = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, H, E] and [T, G, E] -> [T, H, E]"""
    parts = [
        by_formula(*(row[a:b].transpose(0, 1)[None] for row in (q, k, v)))[0].transpose(0, 1)
        for a, b in pairwise(BOUNDS.tolist())
    ]
    return torch.cat(parts).contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float | None, causal: bool, return_lse: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    assert causal and return_lse and softmax_scale is None and max_seqlen_q == max_seqlen_k == max(LENGTHS)
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == BOUNDS.tolist()
    return formula(q, k, v), torch.zeros(q.shape[1], q.shape[0]), None


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None, causal: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert lse.shape == (q.shape[1], q.shape[0])
    assert causal and cu_seqlens_q.tolist() == BOUNDS.tolist() and max_seqlen_q == max(LENGTHS)

    def by_autograd() -> tuple[Tensor, ...]:
        heads = [row.detach().requires_grad_() for row in (q, k, v)]
        again = formula(*heads)
        torch.testing.assert_close(again.detach(), out)
        return torch.autograd.grad(again, heads, dout)

    with ThreadPoolExecutor(1) as apart:  # inside an operation this thread records no gradients
        return apart.submit(by_autograd).result()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    monkeypatch.setattr(flash4, "_package", lambda: found)
    return found


@pytest.mark.parametrize("compiled", [False, True])
def test_kernels_are_asked_for_result_and_gradients(
    compiled: bool, package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a layer's attention, also where that is compiled in one piece."""
    layer = torch.nn.Module()
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randn(heads, sum(LENGTHS), 8, generator=draw).requires_grad_() for heads in (4, 2, 2)]

    monkeypatch.setattr(attention, "_has_flash_attention", lambda _: True)

    def ours(*heads: Tensor) -> Tensor:
        bounds = {"cu_seq_lens_q": BOUNDS, "max_length_q": max(LENGTHS)}
        return attention.packed_sdpa(layer, *(row[None] for row in heads), None, version=4, **bounds)[0][0]

    attend: Callable[..., Tensor] = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    expected = formula(*(row.transpose(0, 1) for row in rows))
    found = attend(*rows)
    torch.testing.assert_close(found, expected)
    of_found, of_expected = (torch.autograd.grad(out.square().sum(), rows) for out in (found, expected))
    for a, b in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_version_with_other_functions_counts_as_not_installed(
    package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash4, "is_flash_attn_4_available", lambda: True)
    assert flash4.is_installed.__wrapped__() is True
    package._flash_attn_bwd = lambda query, key, value: None
    assert flash4.is_installed.__wrapped__() is False
    del package._flash_attn_bwd
    assert flash4.is_installed.__wrapped__() is False

    def not_whole() -> SimpleNamespace:
        raise ImportError("no CUDA libraries")

    monkeypatch.setattr(flash4, "_package", not_whole)
    assert flash4.is_installed.__wrapped__() is False


def test_wide_and_odd_heads_are_left_to_others() -> None:
    rows = [torch.empty(4, 2, size) for size in (8, 12, 64, 128, 136, 256)]
    assert [row.shape[-1] for row in rows if flash4.takes(row, row)] == [8, 64, 128]
    assert not flash4.takes(rows[3], rows[2])


def chosen(shape: dict[str, Any] = SHAPE) -> str:
    return choose_attention(PACKED_FLASH[4], shape, torch.device("cpu"), torch.bfloat16)


def test_kernels_that_give_the_formula_are_taken(package: SimpleNamespace, recwarn: pytest.WarningsRecorder) -> None:
    assert chosen() == PACKED_FLASH[4]
    assert not recwarn


def test_kernels_that_do_not_are_left_with_a_warning(package: SimpleNamespace) -> None:
    with pytest.warns(UserWarning, match="does not tell the number of its heads"):
        assert chosen({}) == PACKED_SDPA
    with pytest.warns(UserWarning, match="not made for heads of 256"):
        assert chosen({**SHAPE, "head_dim": 256}) == PACKED_SDPA

    def skewed(*rows: Tensor, **asked: Any) -> tuple[Tensor, ...]:
        of_q, of_k, of_v = backward(*rows, **asked)
        return of_q, of_k * 1.1, of_v

    package._flash_attn_bwd = skewed
    with pytest.warns(UserWarning, match=r"FlashAttention 4 is off by 0\.1\S* for heads of 64"):
        assert chosen() == PACKED_SDPA

    package._flash_attn_bwd = lambda *rows, **asked: (
        *backward(*rows, **asked)[:2],
        torch.full_like(rows[2], torch.nan),
    )
    with pytest.warns(UserWarning, match="off by nan for heads of 64"):
        assert chosen() == PACKED_SDPA

    def broken(*_: Tensor, **__: Any) -> tuple[Tensor, ...]:
        raise RuntimeError("no such kernel\non this device")

    package._flash_attn_bwd = broken
    with pytest.warns(
        UserWarning, match="torch's own attention is taken: FlashAttention 4: RuntimeError: no such kernel$"
    ):
        assert chosen() == PACKED_SDPA


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 1536}, (12, 2, 128)),
        ({"num_attention_heads": 16, "hidden_size": 1024, "head_dim": 128}, (16, 16, 128)),
        ({"text_config": {"num_attention_heads": 8, "hidden_size": 512, "head_dim": None}}, (8, 8, 64)),
        ({"n_head": 12, "n_embd": 768}, None),
    ],
)
def test_heads_are_those_of_the_config(shape: dict[str, Any], expected: tuple[int, int, int] | None) -> None:
    assert head_shape(shape) == expected
