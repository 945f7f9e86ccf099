"""What holds for every merge operator, and what is special in one."""

import inspect
from dataclasses import replace
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from branchmerge.merge.operators import OPERATORS, make_operator, parameters_of
from branchmerge.merge.operators import blocks as blocks_module
from branchmerge.merge.operators.blocks import gram
from branchmerge.merge.operators.breadcrumbs import Breadcrumbs
from branchmerge.merge.operators.dare_linear import DareLinear
from branchmerge.merge.operators.della import Della, probabilities
from branchmerge.merge.operators.karcher import Karcher
from branchmerge.merge.operators.largest import largest
from branchmerge.merge.operators.model_stock import ModelStock, ratio
from branchmerge.merge.operators.multislerp import MultiSlerp
from branchmerge.merge.operators.nuslerp import NuSlerp
from branchmerge.merge.operators.sce import Sce
from branchmerge.merge.operators.slerp import Slerp
from branchmerge.merge.operators.ties import Ties

EVERY = pytest.mark.parametrize("name", sorted(OPERATORS))
SHAPES = st.sampled_from([(), (1,), (5,), (0,), (3, 4), (2, 0), (2, 3, 4)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count_for(name: str) -> int:
    return 3 if OPERATORS[name].n_way else 2


@EVERY
@given(shape=SHAPES, dtype=DTYPES, scale=st.sampled_from([0.0, 1e-6, 1.0, 100.0]), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_any_shape_and_size_gives_finite_numbers_and_leaves_the_inputs_alone(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float, seed: int
) -> None:
    base, *models = [(scale * random(*shape, seed=seed + i)).to(dtype) for i in range(count_for(name) + 1)]
    before = [tensor.clone() for tensor in (base, *models)]
    merged = OPERATORS[name]()(models, base)
    assert merged.shape == base.shape
    kept = name.startswith("arcee_fusion") or dtype == torch.float64
    assert merged.dtype == (dtype if kept else torch.float32)
    assert torch.isfinite(merged).all()
    assert all(torch.equal(x, y) for x, y in zip((base, *models), before, strict=True))


@EVERY
def test_float64_models_are_merged_in_float64(name: str) -> None:
    """Digits that float32 does not hold are not lost, also where only the backbone or one model has them."""
    model = 1 + 1e-12 * random(40, 30).double()
    merged = OPERATORS[name]()([model] * count_for(name), model)
    torch.testing.assert_close(merged, model, rtol=0, atol=1e-14)


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_one_float64_tensor_is_enough(wide: int) -> None:
    base, left, right = (random(50, seed=seed).double().add(1e-12 if seed == wide else 0) for seed in range(3))
    tensors = [tensor if seed == wide else tensor.float() for seed, tensor in enumerate((base, left, right))]
    found = make_operator("task_arithmetic", {"weights": 0.5})(tensors[1:], tensors[0])
    expected = [
        float(Fraction(w) + (Fraction(x) - Fraction(w)) / 2 + (Fraction(y) - Fraction(w)) / 2)
        for w, x, y in zip(*(tensor.tolist() for tensor in (base, left, right)), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=0, abs=1e-15)


@pytest.mark.parametrize("numbers", [(0.27, 0.04, -0.6, 0.74), (-0.7, -0.33, -1.4, 0.59, -0.002), (1.0, -2.0, 3.0)])
def test_the_karcher_mean_of_single_numbers_is_finite(numbers: tuple[float, ...]) -> None:
    """On a line the others are in the same direction or the opposite one, to which no shortest way leads."""
    merged = OPERATORS["karcher"]()([torch.tensor(number) for number in numbers])
    most = 1 if sum(number > 0 for number in numbers) > len(numbers) / 2 else -1
    mean = sum(map(abs, numbers)) / len(numbers)
    assert merged.item() == pytest.approx(most * mean, rel=1e-6)


@EVERY
@given(seed=st.integers(0, 99), same_base=st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_model_merged_with_itself_is_that_model(name: str, seed: int, same_base: bool) -> None:
    model = random(4, 6, seed=seed)
    # Sums and thinned task vectors give the model back only where the backbone is the model.
    sums = ("task_arithmetic", "ties", "breadcrumbs", "dare_linear", "dare_ties", "della")
    base = model.clone() if same_base or name in sums else random(4, 6, seed=seed + 1)
    merged = OPERATORS[name]()([model.clone() for _ in range(count_for(name))], base)
    torch.testing.assert_close(merged, model, rtol=2e-6, atol=1e-6)


@EVERY
def test_rows_of_zeros_stay_finite(name: str) -> None:
    base, *models = [random(4, 6, seed=i) for i in range(count_for(name) + 1)]
    for tensor in (base, *models):
        tensor[1] = 0
    merged = OPERATORS[name]()(models, base)
    assert torch.isfinite(merged).all()
    assert not merged[1].any()


@EVERY
def test_exactly_opposite_models_stay_finite(name: str) -> None:
    model = random(4, 6)
    assert torch.isfinite(OPERATORS[name]()([model, -model], torch.zeros(4, 6))).all()


@EVERY
def test_blocks_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *models = [random(16, 8, seed=i).bfloat16() for i in range(count_for(name) + 1)]
    operator = OPERATORS[name]()
    if "density" in parameters_of(operator) and "seed" in parameters_of(operator):
        operator = make_operator(name, {"density": 0.9999, **({"epsilon": 1e-5} if name == "della" else {})})
    whole = operator(models, base)
    monkeypatch.setattr(blocks_module, "BLOCK", 24)
    torch.testing.assert_close(operator(models, base), whole, rtol=1e-6, atol=1e-7)


@EVERY
def test_late_parameters_are_parameters_and_change_nothing_that_is_measured(name: str) -> None:
    kind = OPERATORS[name]
    assert kind.late <= set(parameters_of(kind()))
    other = {"weights": (0.7, 0.2), "lam": 0.3, "t": 0.1, "density": (0.3,), "seed": 1}
    changed = replace(kind(), **{key: value for key, value in other.items() if key in kind.late})
    base, left, right = (random(4, 6, seed=i) for i in range(3))
    once, again = kind().measure([left, right], base), changed.measure([left, right], base)
    assert plain(once) == plain(again)


def plain(measured: Any) -> Any:
    """With lists for tensors and arrays, which do not compare as a whole."""
    if isinstance(measured, Tensor | np.ndarray):
        return measured.tolist()
    if isinstance(measured, list | tuple):
        return [plain(value) for value in measured]
    return [plain(value) for value in vars(measured).values()] if hasattr(measured, "kl") else measured


@EVERY
def test_the_backbone_is_asked_for(name: str) -> None:
    operator = OPERATORS[name]()
    if not operator.needs_base():
        operator([random(3), random(3, seed=1)])
        return
    with pytest.raises(ValueError, match="backbone"):
        operator([random(3), random(3, seed=1)])


@EVERY
def test_every_parameter_says_what_it_is(name: str) -> None:
    lines = [inspect.getsource(kind) for kind in OPERATORS[name].__mro__ if hasattr(kind, "__dataclass_fields__")]
    for parameter in parameters_of(OPERATORS[name]()):
        assert any(f"    {parameter}: " in source and '    """' in source for source in lines)


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "arcee_fusion"])
def test_operators_of_two_models_refuse_three(name: str) -> None:
    assert not OPERATORS[name].n_way
    with pytest.raises(ValueError):
        OPERATORS[name]()([random(3, seed=i) for i in range(3)])


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("slerp", {"t": 1.5}, "t must lie between 0 and 1"),
        ("slerp", {"t": "half"}, "t must be a finite number"),
        ("nuslerp", {"weights": [1, -1]}, "at least 0"),
        ("multislerp", {"weights": [1, -1]}, "sum to zero"),
        ("karcher", {"max_iter": 0}, "whole number of at least 1"),
        ("karcher", {"tol": 0}, "above zero"),
        ("ties", {"density": 1.2}, "density must lie between 0 and 1"),
        ("ties", {"density": []}, "it is empty"),
        ("ties", {"density": None}, "density must be a finite number, it is None"),
        ("ties", {"density": "half"}, "density must be a finite number, it is 'half'"),
        ("ties", {"lam": float("nan")}, "lam must be a finite number"),
        ("ties", {"normalize": 1}, "true or false"),
        ("sce", {"select_topk": -0.1}, "select_topk must lie between 0 and 1"),
        ("della", {"density": 0.05}, "must stay within 0 and 1"),
        ("dare_linear", {"seed": -1}, "seed must be a whole number"),
        ("dare_linear", {"weights": [1, -1], "normalize": True}, "sum to zero"),
    ],
)
def test_bad_values_are_refused(name: str, parameters: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OPERATORS[name](**parameters)


def test_two_densities_do_not_fit_three_models() -> None:
    with pytest.raises(ValueError, match="2 densities for 3 models"):
        Ties(density=(0.1, 0.2))([random(4)] * 3, random(4, seed=1))


def test_gram_is_that_of_the_differences() -> None:
    tensors, origin = [random(3, 5, seed=i) for i in range(3)], random(3, 5, seed=9)
    flat = torch.stack([(tensor.double() - origin.double()).flatten() for tensor in tensors])
    torch.testing.assert_close(gram(tensors, origin), flat @ flat.T)


@given(st.lists(st.integers(0, 4), max_size=30), st.data())
def test_exactly_the_k_largest_are_taken_block_by_block(numbers: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(numbers)))
    values = torch.tensor(numbers, dtype=torch.float32)
    (found,) = largest(values.numpy().copy(), k)
    take = found.taker()
    taken = torch.cat([torch.zeros(0, dtype=torch.bool), *(take(part) for part in values.split(7))])
    first = sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:k]
    assert taken.nonzero().flatten().tolist() == sorted(first)


def test_slerp_walks_on_the_circle() -> None:
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    expected = torch.tensor([3**0.5 / 2, 0.5])
    torch.testing.assert_close(Slerp(t=1 / 3)([left, right]), expected)
    torch.testing.assert_close(NuSlerp(weights=(2, 1))([left, right]), expected)


def test_nuslerp_of_task_vectors_starts_at_the_backbone() -> None:
    base, left, right = (random(6, seed=i) for i in range(3))
    expected = base + NuSlerp()([left - base, right - base])
    torch.testing.assert_close(NuSlerp(from_base=True)([left, right], base), expected)


def test_karcher_mean_has_no_mean_angle_left() -> None:
    models = [random(50, seed=i) for i in range(4)]
    mean = Karcher(max_iter=200, tol=1e-12)(models).double()
    m = mean / mean.norm()
    tangents = []
    for model in models:
        u = model.double() / model.double().norm()
        theta = torch.acos(u @ m)
        tangents.append(theta / torch.sin(theta) * (u - torch.cos(theta) * m))
    assert torch.stack(tangents).sum(0).norm() < 1e-5
    torch.testing.assert_close(mean.norm().float(), torch.stack([model.norm() for model in models]).mean())


def test_multislerp_is_the_mean_direction_at_the_mean_norm() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    torch.testing.assert_close(MultiSlerp()([a, b]), torch.tensor([3.0, 3.0]) / 2**0.5)


@pytest.mark.parametrize(("cosine", "t"), [(1.0, 1.0), (0.0, 0.0), (0.5, 2 / 3)])
def test_model_stock_ratio_of_two(cosine: float, t: float) -> None:
    assert ratio(torch.tensor([[1, cosine], [cosine, 1]], dtype=torch.float64)) == pytest.approx(t)


def test_model_stock_reports_its_ratio() -> None:
    a = random(8)
    assert ModelStock().facts(ModelStock().measure([a, a], torch.zeros(8))) == {"t": pytest.approx(1)}


def test_ties_by_hand() -> None:
    a = torch.tensor([4.0, -1.0, 0.5, 2.0])
    b = torch.tensor([-1.0, -3.0, 2.0, 4.0])
    # Of a stay 4 and 2, of b -3 and 4; the last coordinate is a mean of two.
    assert Ties(density=0.5)([a, b], torch.zeros(4)).tolist() == [4, -3, 0, 3]


def test_small_weights_average_as_large_ones_do() -> None:
    base, left, right = torch.zeros(3), torch.tensor([2.0, 0.0, 4.0]), torch.tensor([4.0, 3.0, -2.0])
    for weights, expected in ((1e-12, [3.0, 3.0, 4.0]), ((1.0, 1e-12), [2.0, 3.0, 4.0])):
        merged = make_operator("ties", {"density": 1.0, "weights": weights})([left, right], base)
        assert merged.tolist() == pytest.approx(expected, rel=1e-6)


def test_weights_that_cancel_to_rounding_are_not_divided_by() -> None:
    """0.1 + 0.2 - 0.3 is 5e-17."""
    base, models = torch.zeros(1), [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([-1.0])]
    merged = make_operator("ties", {"density": 1.0, "weights": (0.1, 0.2, -0.3)})(models, base)
    assert merged.tolist() == pytest.approx([0.6])


def test_sce_takes_what_only_a_model_of_little_energy_changed() -> None:
    base, left, right = torch.zeros(2), torch.tensor([100.0, 0.0]), torch.tensor([0.0, 1e-3])
    assert Sce()([left, right], base).tolist() == pytest.approx([100.0, 1e-3])


def test_breadcrumbs_by_hand() -> None:
    a = torch.tensor([5.0, -4.0, 3.0, 2.0, 1.0])
    assert Breadcrumbs(density=0.4, gamma=0.2)([a], torch.zeros(5)).tolist() == [0, -4, 3, 0, 0]


def test_sce_by_hand() -> None:
    a, b = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([-1.0, 1.0, 1.0])
    # Variances 2.25, 0, 0.25: half of the two that are not zero is the first; its sum is positive.
    assert Sce(select_topk=0.5)([a, b], torch.zeros(3)).tolist() == [2, 0, 0]
    _, weights = Sce().measure([a, b], torch.zeros(3))
    assert weights == [5 / 8, 3 / 8]


@pytest.mark.parametrize(
    ("name", "shape"), [("dare_linear", (200, 100)), ("della", (200, 100)), ("dare_ties", (20000,))]
)
def test_the_draw_keeps_the_share_and_the_expectation(name: str, shape: tuple[int, ...]) -> None:
    model = 1 + random(*shape).abs()
    operator = make_operator(name, {"density": 0.3, "normalize": False})
    merged = operator([model], torch.zeros(shape))
    n = merged.numel()
    assert abs((merged != 0).sum() / n - 0.3) < 4 * (0.21 / n) ** 0.5
    assert merged.mean().item() == pytest.approx(model.mean().item(), rel=0.05)


def test_each_model_has_a_draw_of_its_own_and_each_seed_too() -> None:
    ones, zeros = torch.ones(1000), torch.zeros(1000)
    both = DareLinear(density=0.5)([ones, ones], zeros)
    assert (both == 2).sum() > 300
    assert not torch.equal(both, DareLinear(density=0.5, seed=7)([ones, ones], zeros))
    assert torch.equal(both, DareLinear(density=0.5)([ones, ones], zeros))


def test_della_keeps_large_entries_more_often() -> None:
    p = probabilities(torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), 0.5, 0.2)
    torch.testing.assert_close(p, torch.tensor([[0.7, 0.3, 0.5], [0.3, 0.5, 0.7]]))
    model = torch.arange(1.0, 101).repeat(400, 1)
    kept = (Della(density=0.5, epsilon=0.4)([model], torch.zeros_like(model)) != 0).float().mean(0)
    assert kept[-10:].mean() > 0.8 > 0.2 > kept[:10].mean()


def test_della_sorts_each_row_once() -> None:
    sizes = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)).bfloat16().float().abs()
    with torch.profiler.profile() as profile:
        p = probabilities(sizes, 0.5, 0.1)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::sort") == 1
    ranks = sizes.argsort(dim=1, stable=True).argsort(dim=1)  # equal ones by their position
    assert torch.equal(p, 0.5 - 0.1 + 2 * 0.1 * ranks.float() / 499)


@pytest.mark.parametrize(("share", "variances"), [(1.0, False), (0.5, True)])
def test_sce_takes_variances_only_to_select_by_them(share: float, variances: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    base, *models = (torch.randn(8, 50, generator=draw) for _ in range(3))
    with torch.profiler.profile() as profile:
        make_operator("sce", {"select_topk": share})(models, base)
    assert any(event.key == "aten::var" for event in profile.key_averages()) == variances
