"""linear and task_arithmetic against their formulas."""

import pytest
import torch

from branchmerge.errors import UserError
from branchmerge.merge.operators import OPERATORS, changed_parameters, make_operator
from branchmerge.merge.operators.linear import Linear
from branchmerge.merge.operators.task_arithmetic import TaskArithmetic


def models(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(5, 7, generator=generator) for _ in range(n)]


def test_linear_is_the_mean() -> None:
    three = models(3)
    torch.testing.assert_close(Linear()(three), torch.stack(three).mean(0))


def test_linear_weights_are_normalised() -> None:
    a, b = models(2)
    torch.testing.assert_close(Linear((3, 1))([a, b]), 0.75 * a + 0.25 * b)


def test_linear_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 weights for 3 models"):
        Linear((1, 1))(models(3))
    with pytest.raises(ValueError, match="sum to zero"):
        Linear((1, -1))


def test_task_arithmetic_adds_the_task_vectors() -> None:
    base, a, b = models(3)
    torch.testing.assert_close(TaskArithmetic(0.5)([a, b], base), base + 0.5 * (a - base) + 0.5 * (b - base))


def test_task_arithmetic_needs_the_backbone() -> None:
    with pytest.raises(ValueError, match="needs the backbone"):
        TaskArithmetic()(models(2))


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_operators_are_pure(name: str) -> None:
    base, a, b = models(3)
    before = [tensor.clone() for tensor in (base, a, b)]
    OPERATORS[name]()([a, b], base)
    assert all(torch.equal(x, y) for x, y in zip((base, a, b), before, strict=True))


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_merging_one_model_with_itself_is_the_identity(name: str) -> None:
    (weight,) = models(1)
    base = weight if OPERATORS[name]().needs_base() else None
    torch.testing.assert_close(OPERATORS[name]()([weight, weight.clone()], base), weight)


def test_unknown_operators_and_parameters_are_refused() -> None:
    with pytest.raises(UserError, match="choose one of arcee_fusion, arcee_fusion_paper"):
        make_operator("ties2", {})
    with pytest.raises(UserError, match="has no such parameter; it has delta, direction"):
        make_operator("arcee_fusion", {"lambda": 1})


def test_only_changed_parameters_name_a_result() -> None:
    usual = make_operator("arcee_fusion", {"lam": 0.5})
    assert changed_parameters(make_operator("arcee_fusion", {"lam": 0.5}), usual) == {}
    assert changed_parameters(make_operator("arcee_fusion", {"lam": 1.5}), usual) == {"lam": 1.5}
