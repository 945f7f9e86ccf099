"""What surrounds FlashAttention 2 and 3: the formula is in place of their kernels, as those need a GPU."""

import sys
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_student
from test_attention import MODELS, documents, everywhere, heads
from torch import Tensor

from branchmerge.data.batch import make_batch
from branchmerge.student import attention, flash
from branchmerge.student.attention import PACKED_FLASH, PACKED_SDPA, by_formula
from branchmerge.student.backbone import load_model
from branchmerge.student.loss import packed_logits
from branchmerge.student.trials import choose_attention

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
WINDOW, CAP = {"sliding_window": 4096}, {"attn_logit_softcapping": 50.0}
Install = Callable[[Callable[..., Tensor]], None]


def newer(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """With the parameters of flash_attn_varlen_func; [T, H, E] and twice [T, G, E] -> [T, H, E]."""
    assert causal and max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    window = None if window_size[0] < 0 else window_size[0] + 1
    parts = (
        [row[a:b].transpose(0, 1)[None] for row in (q, k, v)] for a, b in pairwise(cu_seqlens_q.tolist())
    )  # each [1, heads, tokens, E]
    return torch.cat([by_formula(*part, softmax_scale, window, softcap or None)[0].transpose(0, 1) for part in parts])


def older(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """Of a version before windows and caps."""
    return newer(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function as that of both packages."""

    def installed(varlen: Callable[..., Any]) -> None:
        for module in flash.MODULES.values():
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_varlen_func=varlen))
        flash._FOUND.clear()

    return installed


def chosen(version: int = 2, **limits: Any) -> str:
    return choose_attention(PACKED_FLASH[version], SHAPE | limits, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("limits", [{}, WINDOW, CAP, WINDOW | CAP], ids=str)
@pytest.mark.parametrize("version", [2, 3])
def test_kernels_that_give_the_formula_are_taken(
    version: int, limits: dict[str, Any], install: Install, recwarn: pytest.WarningsRecorder
) -> None:
    install(newer)
    assert chosen(version, **limits) == PACKED_FLASH[version]
    install(lambda *rows, **asked: (newer(*rows, **asked), None))  # some versions return the scores' logarithms too
    assert chosen(version) == PACKED_FLASH[version]
    assert not recwarn


def test_kernels_that_give_other_results_or_gradients_or_fail_are_left(install: Install) -> None:
    def without_window(*rows: Tensor, window_size: tuple[int, int] = (-1, -1), **asked: Any) -> Tensor:
        return newer(*rows, **asked)

    install(without_window)
    assert chosen() == PACKED_FLASH[2]
    with pytest.warns(UserWarning, match=r"torch's own .* taken: FlashAttention 2 is off by \d\.\d+ for heads of 16"):
        assert chosen(**WINDOW) == PACKED_SDPA
    assert chosen(**WINDOW, use_sliding_window=False) == PACKED_FLASH[2]

    def skewed(q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> Tensor:
        return newer(q, k + 0.1 * (k - k.detach()), v, **asked)

    install(skewed)
    with pytest.warns(UserWarning, match=r"FlashAttention 3 is off by 0\.1"):
        assert chosen(3) == PACKED_SDPA

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\non this device")

    install(broken)
    with pytest.warns(UserWarning, match="taken: FlashAttention 2: RuntimeError: no kernel image is available$"):
        assert chosen() == PACKED_SDPA


def test_a_package_that_cannot_be_imported_is_left(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(newer)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.warns(UserWarning, match="FlashAttention 2: ModuleNotFoundError: .*flash_attn"):
        assert chosen(**WINDOW) == PACKED_SDPA


def test_heads_that_the_config_does_not_tell_cannot_be_tried(install: Install) -> None:
    install(newer)
    with pytest.warns(UserWarning, match="does not tell the number of its heads"):
        assert choose_attention(PACKED_FLASH[2], {}, torch.device("cpu"), torch.bfloat16) == PACKED_SDPA


def test_what_a_version_does_not_know_is_left_to_others(install: Install) -> None:
    rows = [torch.empty(4, 2, size) for size in (8, 12, 256, 264)]
    install(older)
    assert [flash.takes(2, row, row, None, None) for row in rows] == [True, False, True, False]
    assert not flash.takes(2, rows[0], rows[2], None, None)
    assert not flash.takes(2, rows[0], rows[0], 8, None) and not flash.takes(3, rows[0], rows[0], None, 8.0)
    install(newer)
    assert flash.takes(2, rows[0], rows[0], 8, 8.0)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_a_model_computes_by_the_kernels(
    model_type: str, tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scale, window and cap included."""
    asked: list[tuple[Any, ...]] = []

    @wraps(newer)
    def listening(*rows: Tensor, **given: Any) -> Tensor:
        asked.append((given.get("window_size"), given.get("softcap")))
        return newer(*rows, **given)

    install(listening)
    monkeypatch.setattr(attention, "_has_flash_attention", lambda _: True)
    folder = make_student(tmp_path / model_type, model_type=model_type, **MODELS[model_type])
    batch = make_batch(documents(), 1)
    logits = {}
    for name in (PACKED_FLASH[2], "eager"):
        model = load_model(folder, torch.float32, name).eval()
        with torch.no_grad():
            if name == "eager":
                alone = [model(torch.tensor(document.tokens)[None]).logits[0] for document in documents()]
                logits[name] = torch.cat(alone)
            else:
                logits[name] = packed_logits(model, batch, everywhere(batch))
    torch.testing.assert_close(logits[PACKED_FLASH[2]], logits["eager"], atol=2e-5, rtol=1e-4)
    window, cap = MODELS[model_type].get("sliding_window"), MODELS[model_type].get("attn_logit_softcapping")
    assert len(asked) == model.config.num_hidden_layers
    assert (None if window is None else (window - 1, 0), cap) in asked


@torch.library.custom_op("tests::varlen", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, back: int, cap: float) -> Tensor:
    """As the packages' kernels, which torch.compile does not look into."""
    return newer(q, k, v, bounds, bounds, longest, longest, None, True, (back, 0), cap).contiguous()


@_opaque.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)


@pytest.mark.parametrize("version", [2, 3])
def test_a_layer_compiles_whole_with_the_kernels(
    version: int, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    ) -> Any:  # fmt: skip
        return torch.ops.tests.varlen(q, k, v, cu_seqlens_q, max_seqlen_q, window_size[0], softcap)

    install(varlen)
    q, _, v = heads(50)
    assert flash.takes(version, q, v, 9, 2.0)  # as the trial asks, which comes first in training too
    monkeypatch.setattr(attention, "_has_flash_attention", lambda _: True)
    layer, bounds = torch.nn.Module(), torch.tensor([0, 7, 50], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "max_length_q": 43, "sliding_window": 9, "softcap": 2.0}

    def attend(*rows: Tensor, number: int | None) -> Tensor:
        return attention.packed_sdpa(layer, *rows, None, version=number, **packed)[0]

    with torch.no_grad():
        expected = by_formula_of(heads(50))
        found = torch.compile(attend, backend="aot_eager", fullgraph=True)(*heads(50), number=version)
    torch.testing.assert_close(found, expected)


def by_formula_of(rows: list[Tensor]) -> Tensor:
    parts = zip(*(row.split((7, 43), dim=2) for row in rows), strict=True)
    return torch.cat([by_formula(q, k, v, None, 9, 2.0) for q, k, v in parts], dim=2).transpose(1, 2)
