"""Merging in memory."""

import pytest
import torch

from branchmerge.errors import UserError
from branchmerge.merge import merge_state_dicts
from branchmerge.merge.operators.arcee_fusion import ArceeFusion
from branchmerge.merge.operators.task_arithmetic import TaskArithmetic


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in (("w", (6, 5)), ("b", (5,)))}
    return {**weights, "steps": torch.tensor([3, 4])}


MODELS = {name: state(seed) for seed, name in enumerate(("math", "code", "science"))}


def test_a_tree_of_state_dicts() -> None:
    merged = merge_state_dicts(MODELS, ["code", ["science", "math"]], lam=0.5)
    operator = ArceeFusion(0.5)
    for name in ("w", "b"):
        inner = operator([MODELS["science"][name], MODELS["math"][name]])
        assert torch.equal(merged[name], operator([MODELS["code"][name], inner]))
    assert torch.equal(merged["steps"], torch.tensor([3, 4]))
    assert list(merged) == list(MODELS["code"])


def test_operators_that_need_the_backbone_get_it() -> None:
    base = state(9)
    merged = merge_state_dicts(MODELS, ["math", "code"], "task_arithmetic", base, weights=[0.5, 1])
    expected = TaskArithmetic((0.5, 1))([MODELS["math"]["w"], MODELS["code"]["w"]], base["w"])
    assert torch.equal(merged["w"], expected)


def test_the_result_has_the_dtype_of_the_first_leaf() -> None:
    models = {"a": state(0, torch.bfloat16), "b": state(1)}
    assert merge_state_dicts(models, ["a", "b"], "linear")["w"].dtype == torch.bfloat16
    assert merge_state_dicts(models, ["b", "a"], "linear")["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tree": ["math", "poetry"]}, "there is no model 'poetry'"),
        ({"operator": "ties"}, "needs the backbone"),
        ({"operator": "tis"}, "choose one of"),
        ({"models": {**MODELS, "code": {"w": MODELS["code"]["w"]}}}, "is in one of them only"),
        ({"models": {**MODELS, "code": {**MODELS["code"], "w": torch.zeros(2, 2)}}}, "has the shapes"),
        ({"models": {**MODELS, "code": {**MODELS["code"], "steps": torch.tensor([3, 5])}}}, "the integers of steps"),
        (
            {"models": {**MODELS, "code": {**MODELS["code"], "w": MODELS["code"]["w"].long()}}},
            "w holds torch.float32 in",
        ),
        (
            {"models": {**MODELS, "code": {**MODELS["code"], "w": MODELS["code"]["w"] * torch.nan}}},
            "code: w holds values",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(change: dict[str, object], said: str) -> None:
    arguments: dict[str, object] = {"models": MODELS, "tree": ["math", "code"], **change}
    with pytest.raises(UserError, match=said):
        merge_state_dicts(**arguments)  # type: ignore[arg-type]


def test_a_leaf_may_be_called_base() -> None:
    """And is not taken for the backbone."""
    models = {"math": state(0), "base": {**state(1), "w": torch.zeros(2, 2)}}
    with pytest.raises(UserError, match="math and base cannot be merged: w has the shapes"):
        merge_state_dicts(models, ["math", "base"], "task_arithmetic", state(9))
