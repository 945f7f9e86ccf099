"""Rules: other parameters for some tensors."""

from pathlib import Path

import pytest
import torch
from merging import NESTED, load, perturbed, recipe

from branchmerge.errors import UserError
from branchmerge.merge import merge
from branchmerge.merge.operators import make_operator
from branchmerge.merge.rules import GROUPS, layer_of, parse_rules

PAIR = ["math", "code"]


@pytest.fixture(scope="module")
def experts(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {name: perturbed(tiny_student, root / name, seed) for seed, name in enumerate(["math", "code", "science"])}


def test_each_tensor_is_merged_with_its_own_parameters(experts: dict[str, Path], tmp_path: Path) -> None:
    rules = [{"tensors": "mlp", "lam": 0.0}, {"tensors": ["*q_proj*", "norms"], "layers": [1, 1], "lam": 5.0}]
    merged = load(merge(recipe(experts, tmp_path / "merged", rules=rules)))
    models = {name: load(folder) for name, folder in experts.items()}
    seen = set()
    for name, tensor in merged.items():
        lam = 0.0 if "mlp" in name else 5.0 if ".1." in name and ("q_proj" in name or "norm" in name) else 1.5
        seen.add(lam)
        operator = make_operator("arcee_fusion", {"lam": lam})
        inner = operator([models["science"][name], models["math"][name]])
        assert torch.equal(tensor, operator([models["code"][name], inner])), name
    assert seen == {0.0, 1.5, 5.0}


def test_of_several_rules_for_a_parameter_the_last_one_counts(experts: dict[str, Path], tmp_path: Path) -> None:
    rules = [{"tensors": "mlp", "lam": 0.0, "gate": "gt"}, {"layers": 0, "lam": 5.0}, {"layers": 0, "lam": 0.5}]
    folders = {leaf: experts[leaf] for leaf in PAIR}
    merged = load(merge(recipe(folders, tmp_path / "merged", tree=PAIR, rules=rules)))
    math, code = load(experts["math"]), load(experts["code"])
    for name, tensor in merged.items():
        lam = 0.5 if layer_of(name) == 0 else 0.0 if "mlp" in name else 1.5
        operator = make_operator("arcee_fusion", {"lam": lam, "gate": "gt" if "mlp" in name else "ge"})
        assert torch.equal(tensor, operator([math[name], code[name]])), name


def test_weights_differ_by_layer(experts: dict[str, Path], tmp_path: Path) -> None:
    rules = [{"layers": [0, 0], "weights": [1, 0]}, {"tensors": "embeddings", "weights": [0, 1]}]
    folders = {leaf: experts[leaf] for leaf in PAIR}
    merged = load(merge(recipe(folders, tmp_path / "merged", "linear", PAIR, rules=rules)))
    math, code = load(experts["math"]), load(experts["code"])
    for name, tensor in merged.items():
        expected = math[name] if layer_of(name) == 0 else code[name] if "embed" in name else None
        torch.testing.assert_close(tensor, (math[name] + code[name]) / 2 if expected is None else expected)


def test_a_rule_holds_where_both_name_and_layer_fit() -> None:
    first, second = parse_rules([{"lam": 1.0, "layers": 3}, {"tensors": "*.mlp.*", "lam": 2.0}])
    up = "model.layers.{}.mlp.up_proj.weight"
    assert first.holds_for(up.format(3)) and second.holds_for(up.format(3))
    assert not first.holds_for(up.format(13)) and second.holds_for(up.format(13))
    assert not first.holds_for("model.embed_tokens.weight") and not second.holds_for("model.embed_tokens.weight")
    assert first.layers == (3, 3)


@pytest.mark.parametrize(
    ("tensor", "groups"),
    [
        ("model.layers.0.self_attn.q_proj.weight", {"attention"}),
        ("model.layers.0.post_attention_layernorm.weight", {"norms"}),  # Llama, Qwen, Mistral
        ("model.layers.0.self_attn.q_norm.weight", {"attention", "norms"}),  # Qwen3
        ("model.layers.0.mlp.up_proj.weight", {"mlp"}),
        ("model.layers.0.post_mlp_layernorm.weight", {"norms"}),  # GLM-4
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", {"mlp"}),  # Mixtral
        ("model.layers.0.feed_forward.w1.weight", {"mlp"}),
        ("gpt_neox.layers.0.attention.query_key_value.weight", {"attention"}),
        ("transformer.h.0.self_attention.dense.weight", {"attention"}),
        ("h.0.attn.c_attn.weight", {"attention"}),  # GPT-2
        ("h.0.ln_1.weight", {"norms"}),
        ("wte.weight", {"embeddings"}),
        ("model.embed_tokens.weight", {"embeddings"}),
    ],
)
def test_groups_hold_for_what_they_are_named_after(tensor: str, groups: set[str]) -> None:
    assert {group for group in GROUPS if parse_rules([{"tensors": group, "lam": 1}])[0].holds_for(tensor)} == groups


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12), ("h.0.attn.c_attn.weight", 0), ("model.norm.weight", None),
        ("transformer.blocks.3.norm_1.weight", 3), ("model.mylayers.3.weight", None),
        ("model.layers.3.mlp.experts.7.up_proj.weight", 3),
    ],
)  # fmt: skip
def test_layers_are_told_by_the_name(tensor: str, layer: int | None) -> None:
    assert layer_of(tensor) == layer


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"tensors": "mlp"}, "changes nothing"),
        ("mlp", "changes nothing"),
        ({"layers": [5, 2], "lam": 1}, "is not .first, last."),
        ({"layers": [1, 2, 3], "lam": 1}, "is not .first, last."),
    ],
)
def test_what_is_no_rule_is_refused(rule: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_rules([rule])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"tensor": "mlp"}, r"rules: tensor: .* in a rule stand tensors, layers, delta"),
        ({"lam": "much"}, "lam must be a number"),
    ],
)
def test_parameters_of_rules_are_checked_before_the_merge(
    experts: dict[str, Path], tmp_path: Path, rule: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        recipe(experts, tmp_path / "merged", tree=NESTED, rules=[rule])


def test_weights_of_rules_must_fit_the_tree(experts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 weights for 3 models"):
        recipe(
            experts,
            tmp_path / "m",
            "linear",
            ["math", "code", "science"],
            rules=[{"tensors": "mlp", "weights": [1, 2]}],
        )


@pytest.mark.parametrize("rule", [{"tensors": "mpl", "lam": 0.5}, {"tensors": "mlp", "layers": [2, 9], "lam": 0.5}])
def test_a_rule_that_holds_for_no_tensor_is_refused(
    experts: dict[str, Path], tmp_path: Path, rule: dict[str, object]
) -> None:
    with pytest.raises(UserError, match=r"holds for no tensor; names are such as model\."):
        merge(recipe(experts, tmp_path / "out" / "merged", rules=[rule]))
    assert not (tmp_path / "out").exists()


def test_rules_that_cannot_hold_together_are_told_before_the_merge(
    experts: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    rules = [{"tensors": "*up_proj*", "density": 0.89}, {"layers": 1, "epsilon": 0.12}]
    folders = {leaf: experts[leaf] for leaf in PAIR}
    apart = [{**rules[0], "layers": 0}, rules[1]]
    merge(recipe(folders, tmp_path / "apart", "della", PAIR, base=tiny_student, rules=apart))
    together = recipe(folders, tmp_path / "out" / "merged", "della", PAIR, base=tiny_student, rules=rules)
    with pytest.raises(UserError, match=r"rules: those for model.layers.1.mlp.up_proj.weight cannot hold together"):
        merge(together)
    assert not (tmp_path / "out").exists()


def test_a_rule_that_needs_the_backbone_is_refused_without(
    experts: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    rules = [{"tensors": "mlp", "from_base": True}]
    folders = {leaf: experts[leaf] for leaf in PAIR}
    with pytest.raises(UserError, match="needs the backbone"):
        recipe(folders, tmp_path / "m", "nuslerp", PAIR, rules=rules)
    merged = load(merge(recipe(folders, tmp_path / "m", "nuslerp", PAIR, base=tiny_student, rules=rules)))
    base, left, right = (load(folder) for folder in (tiny_student, *folders.values()))
    for name, tensor in merged.items():
        operator = make_operator("nuslerp", {"from_base": "mlp" in name})
        torch.testing.assert_close(tensor, operator([left[name], right[name]], base[name]).float(), msg=name)
