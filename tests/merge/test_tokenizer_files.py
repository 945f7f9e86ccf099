"""What a merged model takes over from Left beside weights: part of what makes it, and told where others differ."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from merging import perturbed, recipe

from branchmerge.errors import UserError
from branchmerge.merge import merge, recipe_file, stream

TREE = ["math", "code"]
Folders = dict[str, Path]


@pytest.fixture
def experts(tiny_student: Path, tmp_path: Path) -> Folders:
    return {name: perturbed(tiny_student, tmp_path / name, seed) for seed, name in enumerate(TREE)}


def change_template(folder: Path) -> None:
    with (folder / "chat_template.jinja").open("a") as file:
        file.write("{# corrected #}")


def test_a_corrected_template_of_left_is_no_finished_work(experts: Folders, tmp_path: Path) -> None:
    out = merge(recipe(experts, tmp_path / "out", tree=TREE))
    change_template(experts["math"])
    with pytest.raises(UserError, match=r"holds a result made otherwise \(tokenizer: "):
        merge(recipe(experts, out, tree=TREE))
    merge(recipe(experts, out, tree=TREE, overwrite=True))
    assert (out / "chat_template.jinja").read_bytes() == (experts["math"] / "chat_template.jinja").read_bytes()


def test_a_template_that_is_corrected_meanwhile_is_told(
    experts: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest would name the old one, and the result hold the new one."""
    usual, out = stream._pass, tmp_path / "results" / "out"

    def changing(*given: Any) -> None:
        usual(*given)
        change_template(experts["math"])

    with monkeypatch.context() as patched:
        patched.setattr(stream, "_pass", changing)
        with pytest.raises(UserError, match=r"math: its tokenizer, chat template or config was changed while"):
            merge(recipe(experts, out, tree=TREE))
    assert [path.name for path in out.parent.iterdir() if not path.name.endswith(".lock")] == []
    merge(recipe(experts, out, tree=TREE))
    assert (out / "chat_template.jinja").read_bytes() == (experts["math"] / "chat_template.jinja").read_bytes()


def test_one_of_another_parent_changes_nothing(
    experts: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = merge(recipe(experts, tmp_path / "out", tree=TREE))
    change_template(experts["code"])
    merge(recipe(experts, out, tree=TREE))
    assert f"{out}: done already" in capsys.readouterr().out


def test_results_from_before_are_what_they_are(
    experts: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = merge(recipe(experts, tmp_path / "out", tree=TREE))
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["work"]["tokenizer"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    change_template(experts["math"])
    merge(recipe(experts, out, tree=TREE))
    assert f"{out}: done already" in capsys.readouterr().out


def test_parents_that_are_prompted_otherwise_are_named(
    experts: Folders, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(experts["code"], experts["code"].with_name("science"))
    experts["science"] = experts["code"].with_name("science")
    merge(recipe(experts, tmp_path / "same", tree=[["math", "code"], "science"]))
    assert "warning" not in capsys.readouterr().out
    change_template(experts["code"])
    ends = {"eos_token_id": [2, 0]}
    for name in ("code", "science"):
        (experts[name] / "generation_config.json").write_text(json.dumps(ends))
    merge(recipe(experts, tmp_path / "other", tree=[["math", "code"], "science"]))
    said = capsys.readouterr().out
    assert "warning: code: chat template other than of math, whose the merged model gets" in said
    assert "warning: code, science: end-of-sequence tokens other than of math, whose the merged model gets" in said


def test_the_backbone_is_no_parent_of_a_template(
    experts: Folders, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = perturbed(tiny_student, tmp_path / "base", 7)
    change_template(base)
    merge(recipe(experts, tmp_path / "out", "ties", TREE, base=base))
    assert "warning" not in capsys.readouterr().out


def test_a_list_of_one_end_token_is_that_token(
    experts: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (experts["code"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    merge(recipe(experts, tmp_path / "out", tree=TREE))
    assert "warning" not in capsys.readouterr().out


def test_a_recipe_of_a_gpu_asks_for_one(experts: Folders, tmp_path: Path) -> None:
    out = merge(recipe(experts, tmp_path / "out", tree=TREE))
    assert "device" not in (out / "recipe.yaml").read_text()
    with (out / "recipe.yaml").open("a") as file:
        file.write("device: cuda:99\n")
    with pytest.raises(UserError, match=r"device cuda:99: torch finds . CUDA devices here"):
        recipe_file.load(out / "recipe.yaml", tmp_path / "again")
