"""The paper's equations and the null controls."""

import math

import pytest
import torch

from branchmerge.merge.operators.arcee_fusion import ArceeFusion
from branchmerge.merge.operators.arcee_fusion_null import ArceeFusionNull
from branchmerge.merge.operators.arcee_fusion_paper import ArceeFusionPaper


def experts(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    left = 0.02 * torch.randn(600, 500, generator=generator)
    right = left + 3e-3 * torch.randn(600, 500, generator=generator)
    return left.to(dtype), right.to(dtype)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.5])
def test_the_papers_equations(lam: float) -> None:
    """Eq. 1 and 7 line by line in float64 numpy style."""
    left, right = experts()
    p, q = (model.double().flatten().softmax(0) for model in (left, right))
    S = (p * (p.log() - q.log())).sum() * (left.double() - right.double())
    ordered = S.flatten().sort().values
    q1, median, q3 = (ordered[math.floor(share * (S.numel() - 1))] for share in (0.25, 0.5, 0.75))
    expected = torch.where(median + lam * (q3 - q1) < S, right, left)
    assert float((ArceeFusionPaper(lam)([left, right]) == expected).double().mean()) > 0.99999


def test_the_papers_signed_difference_takes_from_one_side_only() -> None:
    left, right = experts()
    taken = ArceeFusionPaper()([left, right]) != left
    assert bool(taken.any()) and bool((left - right)[taken].min() > 0)


@pytest.mark.parametrize("by", ["random", "delta", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_null_controls_take_as_much(by: str, dtype: torch.dtype) -> None:
    left, right = experts(dtype)
    operator = ArceeFusion(lam=0.5)
    _, taken, _ = operator.fuse(operator.measure([left, right]), (left, right))
    merged = ArceeFusionNull(lam=0.5, by=by)([left, right])
    from_right = (merged == right) & (left != right)
    assert torch.equal(torch.where(from_right, right, left), merged)
    # Where Left and Right are equal, choosing them does not show.
    shows = float((left != right).double().mean()) if by != "delta" else 1.0
    assert int(from_right.sum()) == pytest.approx(taken * shows, rel=0.02)


def test_null_controls_that_do_not_draw_take_exactly_as_much() -> None:
    """By rows, a part of one more row makes up the number."""
    left, right = experts()
    right = torch.where(left == right, left + 1.0, right)  # so that what is taken shows
    operator = ArceeFusion(lam=0.5)
    _, taken, _ = operator.fuse(operator.measure([left, right]), (left, right))
    assert taken % 500
    for by in ("delta", "kl"):
        assert int((ArceeFusionNull(lam=0.5, by=by)([left, right]) != left).sum()) == taken


def test_each_null_control_chooses_by_its_own_measure() -> None:
    left, right = experts()
    d = (left - right).abs()
    by = {name: ArceeFusionNull(by=name)([left, right]) != left for name in ("random", "delta", "kl")}
    assert float(d[by["delta"]].min()) >= float(d[~by["delta"]].max())
    assert float(d[by["random"]].mean()) == pytest.approx(float(d.mean()), rel=0.02)
    rows = by["kl"].double().mean(1)
    kl = torch.tensor(ArceeFusion().measure([left, right]).kl)
    whole = rows > 0.99
    assert float(kl[whole].min()) >= float(kl[rows < 0.5].max())
    assert int(((rows > 0) & ~whole).sum()) <= 1


def test_the_random_control_follows_its_seed() -> None:
    left, right = experts()
    one, same, other = (ArceeFusionNull(seed=seed)([left, right]) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_an_unknown_control_is_refused() -> None:
    with pytest.raises(ValueError, match="by must be one of random, delta, kl"):
        ArceeFusionNull(by="luck")
