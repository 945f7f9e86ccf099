"""A checkpoint that cannot answer is told in a line, before any other model of the command has answered."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import composed

from branchmerge.errors import UserError
from branchmerge.evaluation.run import evaluate


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])


def _describe(**changes: object) -> Callable[[Path], None]:
    def describe(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return describe


def _change(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights | ({} if value is None else {name: value}), folder / "model.safetensors", {"format": "pt"})

    return change


def _refuse_to_write(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system prompts here') }}")


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (_cut, r"broken/model\.safetensors: not a readable safetensors file"),
    "unknown": (_describe(model_type="foo"), "broken: transformers cannot load it .* model type `foo`"),
    "other shape": (_describe(intermediate_size=128), r"broken: \S+ has the shape \[64, 32\], .* \[128, 32\]"),
    "not whole": (_change(NORM, None), f"broken: its files lack 1 of the model's weights, such as {NORM}"),
    "template": (_refuse_to_write, r"broken: its chat template .* question \(turns: user; .*no system prompts here\)"),
}


@pytest.fixture
def broken(tiny_student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_student, tmp_path / "broken"))


def settings(outputs: Path, *models: Path) -> list[str]:
    return [f"models=[{','.join(map(str, models))}]", f"outputs={outputs}", "benchmark.tasks=[demo_math]",
            "benchmark.limit=1", "benchmark.max_new_tokens=2", "backend.device=cpu", "progress=false"]  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_refused_before_the_first_model_answers(
    kind: str, tiny_student: Path, broken: Path, tmp_path: Path
) -> None:
    breaking, said = BROKEN[kind]
    breaking(broken)
    with pytest.raises(UserError, match=said):
        evaluate(composed(*settings(tmp_path / "outputs", tiny_student, broken)))
    assert not list(tmp_path.rglob("responses"))


def test_weights_that_are_no_numbers_give_no_score(broken: Path, tmp_path: Path) -> None:
    """Greedy search takes the first token of what is no number, and so answers without an error."""
    _change(NORM, torch.full([32], torch.nan))(broken)
    with pytest.raises(UserError, match=f"broken: the tensor {NORM} holds NaN or infinity"):
        evaluate(composed(*settings(tmp_path / "outputs", broken)))


def test_what_transformers_says_as_it_loads_is_a_line(broken: Path, tmp_path: Path) -> None:
    """Of quantised files the headers tell nothing; here the package that reads them is not installed."""
    _describe(quantization_config={"quant_method": "eetq"})(broken)
    with pytest.raises(UserError, match="broken: transformers cannot load it"):
        evaluate(composed(*settings(tmp_path / "outputs", broken)))
