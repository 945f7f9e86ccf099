"""What surrounds FlashAttention 2 and 3: the formula is in place of their kernels, as those need a GPU."""

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as of_transformers

from branchmerge.student.attention import PACKED_SDPA, by_formula
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
    """A function as the package's; what transformers keeps of another one is forgotten."""

    def installed(varlen: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(of_transformers, "_lazy_imports", lambda *_, **__: (None, varlen, None, None, None))
        monkeypatch.setattr(of_transformers, "_loaded_implementation", None)

    return installed


def chosen(number: int = 2, **limits: Any) -> str:
    return choose_attention(f"flash_attention_{number}", SHAPE | limits, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("limits", [{}, WINDOW, CAP, WINDOW | CAP], ids=str)
@pytest.mark.parametrize("number", [2, 3])
def test_kernels_that_give_the_formula_are_taken(
    number: int, limits: dict[str, Any], install: Install, recwarn: pytest.WarningsRecorder
) -> None:
    install(newer)
    assert chosen(number, **limits) == f"flash_attention_{number}"
    assert not recwarn


def test_a_version_without_the_models_window_or_cap_is_left(install: Install) -> None:
    """transformers hands on neither where the function has no parameter of the name, and says nothing."""
    install(older)
    assert chosen() == "flash_attention_2"
    assert chosen(**WINDOW, use_sliding_window=False) == "flash_attention_2"
    for limits in (WINDOW, CAP):
        with pytest.warns(UserWarning, match=r"FlashAttention 2 is not taken.*for heads of 16 it is off by \d\.\d"):
            assert chosen(**limits) == PACKED_SDPA


def test_kernels_that_give_other_gradients_or_fail_are_left(install: Install) -> None:
    @wraps(newer)  # transformers looks at the parameters
    def skewed(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return newer(q, k + 0.1 * (k - k.detach()), v, *args, **kwargs)

    install(skewed)
    with pytest.warns(UserWarning, match=r"FlashAttention 3 is not taken.*it is off by 0\.1"):
        assert chosen(3) == PACKED_SDPA

    @wraps(newer)
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\non this device")

    install(broken)
    with pytest.warns(UserWarning, match="torch's own attention: RuntimeError: no kernel image is available$"):
        assert chosen() == PACKED_SDPA


def test_heads_that_the_config_does_not_tell_cannot_be_tried(install: Install) -> None:
    install(newer)
    with pytest.warns(UserWarning, match="does not tell the number of its heads"):
        assert choose_attention("flash_attention_2", {}, torch.device("cpu"), torch.bfloat16) == PACKED_SDPA
