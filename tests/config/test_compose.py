"""Every configuration file composes, and what is wrong is refused while the command line is read."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from branchmerge import config
from branchmerge.cli import one_line
from branchmerge.config_checks import typed
from branchmerge.errors import UserError
from branchmerge.merge.operators import OPERATORS, make_operator, parameters_of

CONF = Path(__file__).resolve().parents[2] / "conf"
SCHEMAS = {"train": config.TrainConfig, "merge": config.MergeConfig, "evaluate": config.EvaluateConfig}
GROUPS = {
    "train": ["study", "domain", "backbone", "trainer", "logger", "debug"],
    "merge": ["study", "backbone", "operator"],
    "evaluate": ["study", "backbone", "benchmark", "backend"],
}
EVERY_FILE = [
    (primary, f"{group}={path.stem}")
    for primary, groups in GROUPS.items()
    for group in groups
    for path in sorted((CONF / group).glob("*.yaml"))
]

config.register()


def composed(primary: str, *overrides: str) -> config.CommonConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(primary, overrides=list(overrides))
        return typed(cfg, SCHEMAS[primary])


@pytest.mark.parametrize(("primary", "override"), EVERY_FILE)
def test_every_file_composes(primary: str, override: str) -> None:
    own = "study=smollm2_real" in override
    extra = ["study.data_dir=/rows"] if own else []
    assert isinstance(composed(primary, override, *extra), SCHEMAS[primary])


def test_no_group_is_left_out() -> None:
    listed = {group for groups in GROUPS.values() for group in groups}
    assert listed | {"hydra"} == {path.name for path in CONF.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_help_and_docs_explain_every_operator_with_its_source(name: str) -> None:
    lines = (CONF / "hydra" / "help" / "merge.yaml").read_text().splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith(f"  {name} "))
    source = lines[at + 1].strip()
    assert len(lines[at].split()) > 4 and (" models" in source or "Two models" in source)
    page = (CONF.parent / "docs" / "merge.md").read_text()
    assert f"| `{name}` | " in page


@pytest.mark.parametrize("study", [path.stem for path in (CONF / "study").glob("*.yaml")])
def test_every_study_has_corpus_and_budget_for_its_experts(study: str) -> None:
    found = composed("train", f"study={study}", "study.data_dir=/rows").study
    assert set(found.experts) <= set(found.budget)
    assert set(found.experts) <= set(found.corpus)
    assert "mixture" in found.budget


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_has_a_file_with_all_its_parameters_at_their_defaults(name: str) -> None:
    settings = composed("merge", f"operator={name}", "study=smollm2_real", "study.data_dir=/rows")
    assert isinstance(settings, config.MergeConfig)
    values = dict(settings.operator)
    assert values.pop("name") == name
    assert make_operator(name, values) == OPERATORS[name]()
    assert set(values) == set(parameters_of(OPERATORS[name]()))


def operator_with(name: str, *overrides: str) -> dict[str, Any]:
    settings = composed("merge", f"operator={name}", *overrides)
    assert isinstance(settings, config.MergeConfig)
    return dict(settings.operator)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_a_study_may_set_every_parameter_of_an_operator(name: str) -> None:
    keys = list(parameters_of(OPERATORS[name]()))
    chosen = [f"+study.operators.{name}={{{', '.join(f'{key}: 0.7' for key in keys)}}}"]
    assert operator_with(name, *chosen) == {"name": name, **dict.fromkeys(keys, 0.7)}
    given = [f"operator.{key}=0.9" for key in keys]
    assert operator_with(name, *chosen, *given) == {"name": name, **dict.fromkeys(keys, 0.9)}


def test_controls_follow_their_operator() -> None:
    chosen = "+study.operators.arcee_fusion={lam: 0.7, kl: tensor}"
    assert operator_with("arcee_fusion_null", chosen)["kl"] == "tensor"
    found = operator_with("arcee_fusion_null", chosen, "+study.operators.arcee_fusion_null={lam: 0.2, by: kl}")
    assert (found["lam"], found["kl"], found["by"]) == (0.2, "tensor", "kl")


def test_the_budget_follows_the_domain() -> None:
    branch = composed("train", "domain=science")
    assert isinstance(branch, config.TrainConfig)
    budget = branch.study.budget["science"]
    assert (branch.optim.lr, branch.optim.max_steps) == (budget.lr, budget.max_steps)


def test_the_command_line_outranks_the_budget() -> None:
    branch = composed("train", "domain=math", "optim.lr=0.5")
    assert isinstance(branch, config.TrainConfig)
    assert branch.optim.lr == 0.5


def test_the_mixture_control_has_the_budget_of_all_experts_together() -> None:
    study = composed("train", "study=demo").study
    assert study.budget["mixture"].max_steps == sum(study.budget[name].max_steps or 0 for name in study.experts)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.schedule=square", "choose one of constant, cosine"),
        ("optim.lr=-1", "optim.lr=-1.0: must be at least 0"),
        ("data.too_long=ignore", "choose one of drop, truncate"),
        ("study.budget.math.epochs=0", "must be at least 1"),
        ("study.corpus.science.limit=0", "must be at least 1"),
        ("backbone.attn=fast", "choose one of auto, flash_attention_2, .*, sdpa"),
        ("backbone.loss=fast", "choose one of chunked, liger"),
        ("+optim.lrr=1", r"optim\.lrr: there is no such key; did you mean optim\.lr\?"),
        ("+study.corpus.math.pth=x", r"study\.corpus\.math\.pth: there is no such key; did you mean .*\.path\?"),
        ("+quiet=1", "quiet: there is no such key; study, backbone, .* are there"),
        ("optim.eps=0", "optim.eps=0.0: must be at least"),
        ("optim.warmup_ratio=1.5", "optim.warmup_ratio=1.5: must be at most 1"),
        ("seed=4294967296", "seed=4294967296: must be at most 4294967295"),
        ("outputs=", "outputs=: is empty"),
        ("planning.mfu=40", "planning.mfu=40.0: must be at most 1"),
    ],
)
def test_a_value_that_cannot_work_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        composed("train", override)


def test_a_study_without_a_value_it_needs_says_which() -> None:
    with pytest.raises(UserError, match=r"study\.data_dir has no value"):
        composed("train", "study=smollm2_real")


def test_warmup_of_a_study_that_has_none_is_refused() -> None:
    with pytest.raises(UserError, match="no budget"):
        composed("train", "study=smollm2_real", "study.data_dir=/rows", "domain=warmup")


@pytest.mark.parametrize("override", ["optim.lrr=1", "optim.lr=much", "domain=maths", "operator=ties2"])
def test_unknown_keys_names_and_types_are_one_line(override: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        composed("train", override)
    assert "\n" not in one_line(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.devcies=2", "trainer.devcies: there is no such key; did you mean trainer.devices?"),
        ("studdy=demo", "studdy: there is no such key; did you mean study?"),
        (
            "study.budget.math.epoch=2",
            "study.budget.math.epoch: there is no such key; did you mean study.budget.math.epochs?",
        ),
        (
            "optim.lr=much",
            "Error merging override optim.lr=much (Value 'much' of type 'str' could not be converted to Float)",
        ),
    ],
)
def test_a_slip_is_told_without_a_way_that_leads_nowhere(override: str, said: str) -> None:
    """Hydra says to put a + in front of such a key, which is refused then."""
    with pytest.raises(ConfigCompositionException) as caught:
        composed("train", override)
    assert one_line(caught.value) == said


def test_a_slip_in_a_parameter_of_an_operator_is_told_so_too() -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        composed("merge", "operator=ties", "operator.densty=0.3")
    assert one_line(caught.value) == "operator.densty: there is no such key; did you mean operator.density?"


@pytest.mark.parametrize("override", ["benchmark.tasks=[]", "models=[]"])
def test_nothing_to_score_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=r"=\[\]: is empty"):
        composed("evaluate", override)
