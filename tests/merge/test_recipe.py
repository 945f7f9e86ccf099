"""From merge.py's configuration to a recipe: which experts, which tree, what the result is called."""

import re
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from branchmerge import config
from branchmerge.config_checks import typed
from branchmerge.errors import UserError
from branchmerge.merge.operators import make_operator
from branchmerge.merge.recipe import Recipe, from_config
from branchmerge.merge.tree import parse
from branchmerge.study import Manifest, publish

CONF = Path(__file__).resolve().parents[2] / "conf"
DOMAINS = ("math", "code", "science")

config.register()


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Results of a demo study with three finished experts, which from_config only looks up."""
    for domain in DOMAINS:
        make_expert(tmp_path, domain)
    return tmp_path


def make_expert(outputs: Path, domain: str) -> Path:
    folder = outputs / "demo" / "experts" / domain
    with publish(folder, Manifest("expert", domain, {}, {})) as partial:
        (partial / "model.safetensors").write_bytes(domain.encode())
    return folder


def made(outputs: Path, *overrides: str) -> Recipe:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("merge", overrides=[f"outputs={outputs}", *overrides])
        return from_config(typed(cfg, config.MergeConfig), {"resolved": True})


def test_the_default_is_arcee_fusion_over_the_studys_tree(outputs: Path) -> None:
    recipe = made(outputs)
    assert recipe.tree.nested() == ["code", ["science", "math"]]
    assert recipe.operator == make_operator("arcee_fusion", {"lam": 0.75})
    assert recipe.folders == {domain: outputs / "demo" / "experts" / domain for domain in DOMAINS}
    assert recipe.out == outputs / "demo" / "merged" / "arcee_fusion"
    assert (recipe.base, recipe.max_shard_bytes, recipe.config) == (None, 5_000_000_000, {"resolved": True})


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "arcee_fusion"),
        (["operator.lam=0.75"], "arcee_fusion"),
        (["tree=[code,[science,math]]"], "arcee_fusion"),
        (["operator.lam=0.5"], "arcee_fusion-lam0.5"),
        (["operator.lam=2"], "arcee_fusion-lam2.0"),
        (["tree=[[code,science],math]"], "arcee_fusion-code+science++math"),
        (["tree=[code,[math,science]]"], "arcee_fusion-code++math+science"),
        (["tree=[math,code]", "operator.lam=0.5"], "arcee_fusion-lam0.5-math+code"),
        (["vocab=same"], "arcee_fusion"),
        (["vocab=pad"], "arcee_fusion-vocab_pad"),
        (["vocab=intersect", "operator.lam=0.5", "tree=[math,code]"], "arcee_fusion-lam0.5-vocab_intersect-math+code"),
        (["operator=linear"], "linear"),
        (["operator=linear", "tree=[code,science,math]"], "linear"),
        (["operator=linear", "operator.weights=[2,1,1]"], "linear-weights2.0_1.0_1.0"),
        (["operator=linear", "tree=[code,[science,math]]"], "linear-code++science+math"),
    ],
)
def test_the_name_says_what_differs_from_the_default(outputs: Path, overrides: list[str], name: str) -> None:
    assert made(outputs, *overrides).out == outputs / "demo" / "merged" / name


def test_rules_have_a_name_of_their_own_each(outputs: Path) -> None:
    """Else a merge with rules would lie where the one without is expected."""
    told = ["rules=[{tensors: mlp, lam: 0.5}]", "rules=[{tensors: mlp, lam: 0.25}]", "rules=[{layers: 1, lam: 0.5}]"]
    names = [made(outputs, rules).name for rules in told]
    assert len(set(names)) == 3 and all(re.fullmatch(r"arcee_fusion-rules[0-9a-f]{6}", name) for name in names)
    assert made(outputs, told[0], "vocab=pad").name == f"{names[0]}-vocab_pad"


def test_a_parameter_that_the_study_chose_is_not_in_the_name(outputs: Path) -> None:
    chosen = "+study.operators={arcee_fusion:{lam:0.5}}"
    recipe = made(outputs, chosen)
    assert (recipe.name, recipe.operator) == ("arcee_fusion", make_operator("arcee_fusion", {"lam": 0.5}))
    assert made(outputs, chosen, "operator.lam=1.5").name == "arcee_fusion-lam1.5"


def test_every_operator_has_the_parameters_that_the_study_chose(outputs: Path, tiny_student: Path) -> None:
    chosen = [
        "operator=ties",
        f"backbone.path={tiny_student}",
        "+study.operators.ties={density: 0.5, weights: [2, 1, 1]}",
    ]
    recipe = made(outputs, *chosen)
    assert recipe.operator == make_operator("ties", {"density": 0.5, "weights": [2, 1, 1]})
    assert recipe.name == "ties"
    assert made(outputs, *chosen, "operator.density=0.2").name == "ties-density0.2"


def test_a_study_that_names_an_unknown_operator_is_refused(outputs: Path) -> None:
    with pytest.raises(UserError, match=r"study\.operators\.arcee: there is no such operator; choose one of arcee_fus"):
        made(outputs, "+study.operators={arcee: {lam: 0.5}}")


def test_controls_are_named_by_the_parameters_of_their_operator(outputs: Path) -> None:
    control = made(outputs, "operator=arcee_fusion_null")
    assert (control.name, control.operator) == ("arcee_fusion_null", make_operator("arcee_fusion_null", {"lam": 0.75}))
    assert made(outputs, "operator=arcee_fusion_null", "operator.lam=1.5").name == "arcee_fusion_null-lam1.5"
    own = made(outputs, "operator=arcee_fusion_null", "+study.operators.arcee_fusion_null={by: kl}")
    assert (own.name, own.operator) == (
        "arcee_fusion_null", make_operator("arcee_fusion_null", {"lam": 0.75, "by": "kl"})
    )  # fmt: skip


def test_n_way_operators_take_all_leaves_at_once_by_default(outputs: Path) -> None:
    assert made(outputs, "operator=linear").tree == parse(["code", "science", "math"])


def test_out_and_the_other_keys_reach_the_recipe(outputs: Path) -> None:
    recipe = made(outputs, "out=/my/merged", "overwrite=true", "progress=false", "max_shard_gb=0.5")
    assert (recipe.out, recipe.name) == (Path("/my/merged"), "merged")
    assert (recipe.overwrite, recipe.progress, recipe.max_shard_bytes) == (True, False, 500_000_000)


def test_task_arithmetic_gets_the_backbone(outputs: Path, tiny_student: Path) -> None:
    recipe = made(outputs, "operator=task_arithmetic", f"backbone.path={tiny_student}")
    assert (recipe.name, recipe.base) == ("task_arithmetic", tiny_student)


def test_a_rule_may_need_the_backbone(outputs: Path, tiny_student: Path) -> None:
    nuslerp = ["operator=nuslerp", "tree=[code,math]", f"backbone.path={tiny_student}"]
    assert made(outputs, *nuslerp, "rules=[{tensors: mlp, from_base: true}]").base == tiny_student
    assert made(outputs, *nuslerp, "rules=[{tensors: mlp, weights: [1, 2]}]").base is None


def test_a_missing_backbone_is_told_with_the_command_that_makes_it(outputs: Path) -> None:
    with pytest.raises(UserError, match=r"python train\.py study=demo domain=warmup"):
        made(outputs, "operator=task_arithmetic")


@pytest.mark.parametrize("overrides", [[], ["out=/my/merged"], ["operator=linear"], ["tree=[math,science]"]])
def test_a_missing_expert_is_told_with_the_command_that_makes_it(tmp_path: Path, overrides: list[str]) -> None:
    for domain in ("math", "code"):
        make_expert(tmp_path, domain)
    with pytest.raises(UserError, match=r"'science' at .*python train\.py study=demo domain=science") as raised:
        made(tmp_path, *overrides)
    assert "(there now: code, math)" in str(raised.value)


def test_without_any_expert_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there now: none"):
        made(tmp_path)


def test_an_unfinished_expert_does_not_count(outputs: Path) -> None:
    (outputs / "demo" / "experts" / "science" / "manifest.json").unlink()
    with pytest.raises(UserError, match="there is no expert 'science'"):
        made(outputs)


def test_a_branch_beyond_the_studys_experts_can_be_merged(outputs: Path) -> None:
    mixture = make_expert(outputs, "mixture")
    recipe = made(outputs, "tree=[code,mixture]")
    assert (recipe.folders["mixture"], recipe.name) == (mixture, "arcee_fusion-code+mixture")


def test_checkpoint_folders_are_merged_into_out(outputs: Path, tiny_student: Path) -> None:
    recipe = made(outputs, f"tree=[code,{tiny_student}]", "out=/my/merged")
    assert recipe.folders == {"code": outputs / "demo" / "experts" / "code", str(tiny_student): tiny_student}


def test_checkpoint_folders_need_out(outputs: Path, tiny_student: Path) -> None:
    with pytest.raises(UserError, match="with out="):
        made(outputs, f"tree=[code,{tiny_student}]")


def test_a_folder_that_does_not_exist_is_refused(outputs: Path) -> None:
    with pytest.raises(UserError, match="/no/such/model: no such folder"):
        made(outputs, "tree=[code,/no/such/model]", "out=/my/merged")


@pytest.mark.parametrize("tree", ["[code,science,math]", "[[math,code,science],mixture]"])
def test_arcee_fusion_merges_two_at_a_time(outputs: Path, tree: str) -> None:
    make_expert(outputs, "mixture")
    with pytest.raises(UserError, match="merges two models at a time; nest them"):
        made(outputs, f"tree={tree}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["operator.lam=much"], "lam must be a number"),
        (["+operator.lambda=1"], "arcee_fusion has no such parameter; it has delta, direction"),
        (["operator=linear", "operator.weights=[1,-1]"], "sum to zero"),
        (["tree=[math,math]"], "math stands in it twice"),
        (["tree=math"], "nothing to merge"),
    ],
)
def test_what_cannot_work_is_refused_before_any_weight_is_read(outputs: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(outputs, *overrides)


def test_weights_that_do_not_fit_the_tree_are_refused(outputs: Path) -> None:
    with pytest.raises(UserError, match="2 weights for 3 models"):
        made(outputs, "operator=linear", "operator.weights=[1,2]")


def backbone(outputs: Path, student: Path) -> Path:
    """A copy of a student where the study keeps the backbone it made."""
    folder = outputs / "demo" / "backbone"
    with publish(folder, Manifest("backbone", "demo", {}, {})) as partial:
        shutil.copytree(student, partial, dirs_exist_ok=True)
    return folder


def test_the_anatomy_finds_the_studys_backbone(outputs: Path, tiny_student: Path) -> None:
    folder = backbone(outputs, tiny_student)
    recipe = made(outputs)
    assert (recipe.anatomy, recipe.base, recipe.origin) == (True, None, folder)
    arithmetic = made(outputs, "operator=task_arithmetic")
    assert (arithmetic.base, arithmetic.origin) == (folder, None)
    off = made(outputs, "anatomy=false")
    assert (off.anatomy, off.origin) == (False, None)


def test_the_anatomy_goes_without_a_backbone_that_does_not_lie_ready(outputs: Path) -> None:
    before = sorted(outputs.rglob("*"))
    assert made(outputs).origin is None
    assert made(outputs, "study.warmup=false").origin is None  # a GGUF file that was not imported
    assert made(outputs, "backbone.path=/no/such/folder").origin is None
    assert sorted(outputs.rglob("*")) == before


def test_the_anatomy_takes_a_given_backbone(outputs: Path, tiny_student: Path) -> None:
    backbone(outputs, tiny_student)
    other = shutil.copytree(tiny_student, outputs / "other")
    assert made(outputs, f"backbone.path={other}").origin == other


def test_folders_from_elsewhere_have_no_backbone_unless_it_is_given(outputs: Path, tiny_student: Path) -> None:
    backbone(outputs, tiny_student)
    outside = [f"tree=[code,{tiny_student}]", "out=/my/merged"]
    assert made(outputs, *outside).origin is None
    assert made(outputs, *outside, f"backbone.path={tiny_student}").origin == tiny_student


def test_a_vocab_that_is_none_is_refused(outputs: Path) -> None:
    with pytest.raises(UserError, match="vocab=all: choose one of same, pad, intersect"):
        made(outputs, "vocab=all")


def test_a_leaf_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder is given for b"):
        Recipe("linear", make_operator("linear", {}), parse(["a", "b"]), {"a": tmp_path}, tmp_path / "out")


def test_a_model_with_two_names_is_refused(outputs: Path, tiny_student: Path) -> None:
    code = shutil.copytree(tiny_student, outputs / "demo" / "experts" / "code", dirs_exist_ok=True)
    (outputs / "link").symlink_to(code)
    for again in (code, outputs / "link", f"{code}/../code"):
        with pytest.raises(UserError, match=r"code and .* are one folder; each model may be merged once"):
            made(outputs, f"tree=[code,{again}]", "out=/my/merged")


@pytest.mark.parametrize("place", ["experts/code", "backbone", "link", "experts/math/../code", "experts", "."])
def test_a_result_cannot_replace_what_it_is_made_from(outputs: Path, tiny_student: Path, place: str) -> None:
    backbone(outputs, tiny_student)
    (outputs / "demo" / "link").symlink_to(outputs / "demo" / "experts" / "code")
    for operator in ("arcee_fusion", "ties"):  # which only compares with the backbone, and which needs it
        with pytest.raises(UserError, match=r"would replace .*, which it is made from; give another out="):
            made(outputs, f"operator={operator}", f"out={outputs}/demo/{place}", "overwrite=true")
