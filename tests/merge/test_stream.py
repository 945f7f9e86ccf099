"""Merging checkpoints tensor by tensor equals merging them in memory, and a killed merge leaves nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import FLAT, NESTED, in_another_dtype, load, perturbed, recipe
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from branchmerge.config import PROJECT
from branchmerge.errors import UserError
from branchmerge.merge import merge, stream
from branchmerge.merge.operators import Operator, make_operator, parameters_of
from branchmerge.merge.tree import parse
from branchmerge.study import read_manifest, weights_sha256

Weights = dict[str, Tensor]
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def experts(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Three experts of one backbone; do not write into them."""
    root = tmp_path_factory.mktemp("experts")
    return {name: perturbed(tiny_student, root / name, seed) for seed, name in enumerate(FLAT, start=1)}


def in_memory(operator: Operator, folders: Folders, tree: Any, base: Path | None = None) -> Weights:
    """What the operator makes of whole state dicts."""
    origin = load(base) if base is not None else {}

    def fuse(models: Any) -> Weights:
        return {name: operator([model[name] for model in models], origin.get(name)) for name in models[0]}

    return parse(tree).fold(lambda leaf: load(folders[leaf]), fuse)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def left_behind(folder: Path) -> list[str]:
    """What a merge left beside its result, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize(
    ("operator", "parameters", "tree"),
    [
        ("arcee_fusion", {}, NESTED),
        ("arcee_fusion", {"lam": 0.5}, [["math", "science"], "code"]),
        ("linear", {}, FLAT),
        ("linear", {"weights": [2, 1]}, NESTED),
        ("task_arithmetic", {"weights": 0.4}, FLAT),
    ],
)
def test_merging_files_equals_merging_in_memory(
    tiny_student: Path, experts: Folders, tmp_path: Path, operator: str, parameters: dict[str, Any], tree: Any
) -> None:
    base = tiny_student if operator == "task_arithmetic" else None
    out = merge(recipe(experts, tmp_path / "merged", operator, tree, base=base, **parameters))
    found = load(out)
    assert_equal(found, in_memory(make_operator(operator, parameters), experts, tree, base))
    assert any(not torch.equal(found[name], load(experts["code"])[name]) for name in found)


def test_left_and_right_matter(experts: Folders, tmp_path: Path) -> None:
    one, other = (
        load(merge(recipe(experts, tmp_path / name, tree=tree)))
        for name, tree in (("one", ["code", "math"]), ("other", ["math", "code"]))
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_result_loads_and_generates(experts: Folders, tmp_path: Path) -> None:
    out = merge(recipe(experts, tmp_path / "merged"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 * 7?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_config_tokenizer_and_template_are_lefts_byte_for_byte(experts: Folders, tmp_path: Path, name: str) -> None:
    out = merge(recipe(experts, tmp_path / "merged"))
    assert (out / name).read_bytes() == (experts["code"] / name).read_bytes()


def test_the_manifest_holds_the_recipe(experts: Folders, tmp_path: Path) -> None:
    out = merge(recipe(experts, tmp_path / "merged", lam=0.5))
    manifest = read_manifest(out)
    assert manifest is not None
    assert (manifest.kind, manifest.name) == ("merged", "merged")
    facts = {key: manifest.merge[key] for key in ("operator", "parameters", "tree")}
    parameters = parameters_of(make_operator("arcee_fusion", {"lam": 0.5}))
    assert facts == {"operator": "arcee_fusion", "parameters": parameters, "tree": NESTED}
    assert manifest.weights_sha256 == weights_sha256(out)
    parents = [(parent.path, parent.weights_sha256) for parent in manifest.parents]
    assert parents == [(str(experts[leaf]), weights_sha256(experts[leaf])) for leaf in FLAT]


def test_the_backbone_is_a_parent_where_it_was_used(tiny_student: Path, experts: Folders, tmp_path: Path) -> None:
    manifest = read_manifest(merge(recipe(experts, tmp_path / "merged", "task_arithmetic", FLAT, base=tiny_student)))
    assert manifest is not None
    assert [parent.path for parent in manifest.parents] == [*(str(experts[leaf]) for leaf in FLAT), str(tiny_student)]


def test_the_manifest_counts_what_was_taken(experts: Folders, tmp_path: Path) -> None:
    out = merge(recipe(experts, tmp_path / "merged"))
    manifest = read_manifest(out)
    assert manifest is not None
    left, merged = load(experts["code"]), load(out)
    elements = sum(tensor.numel() for tensor in left.values())
    differing = sum(int((merged[name] != left[name]).sum()) for name in left)
    assert (manifest.merge["tensors"], manifest.merge["elements"]) == (len(left), elements)
    assert manifest.merge["share_differing_from_code"] == differing / elements


def test_the_model_card_names_operator_parameters_tree_and_parents(experts: Folders, tmp_path: Path) -> None:
    out = merge(recipe(experts, tmp_path / "merged", lam=0.5))
    card = (out / "README.md").read_text()
    told = ["# merged", "`arcee_fusion`", "`lam=0.5`", str(NESTED)]
    told += [f"| `{folder}` | `{weights_sha256(folder)}` |" for folder in experts.values()]
    assert [text for text in told if text not in card] == []


def test_finished_work_is_not_done_again(experts: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = merge(recipe(experts, tmp_path / "merged"))
    before = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    assert "done already" not in capsys.readouterr().out
    assert merge(recipe(experts, tmp_path / "merged")) == out
    assert f"{out}: done already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lam": 0.5}, r"parameters\.lam: 1\.5 there, 0\.5 now"),
        ({"tree": [["code", "science"], "math"]}, "tree: "),
        ({"tree": ["math", ["science", "code"]]}, "parents: "),
        ({"operator": "linear"}, "operator: "),
        ({"max_shard_bytes": 60_000}, "max_shard_bytes: "),
    ],
)
def test_other_work_in_the_same_place_is_refused(
    experts: Folders, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    out = merge(recipe(experts, tmp_path / "merged"))
    before = weights_sha256(out)
    with pytest.raises(UserError, match=f"holds a result made otherwise .*{said}"):
        merge(recipe(experts, tmp_path / "merged", **changes))
    assert weights_sha256(out) == before


def test_names_of_leaves_are_part_of_what_is_drawn_and_of_nothing_else(
    tiny_student: Path, experts: Folders, tmp_path: Path
) -> None:
    renamed = {f"other-{name}": folder for name, folder in experts.items()}
    for operator in ("dare_ties", "ties"):
        drawn = operator == "dare_ties"
        out = merge(recipe(experts, tmp_path / operator, operator, FLAT, base=tiny_student))
        other = merge(recipe(renamed, tmp_path / f"{operator}-2", operator, list(renamed), base=tiny_student))
        assert (weights_sha256(out) != weights_sha256(other)) == drawn
        if drawn:
            with pytest.raises(UserError, match=r"holds a result made otherwise \(leaves: "):
                merge(recipe(renamed, out, operator, list(renamed), base=tiny_student))
        else:
            merge(recipe(renamed, out, operator, list(renamed), base=tiny_student))


def test_other_work_in_the_same_place_is_refused_before_the_parents_weights_are_read(
    experts: Folders, tmp_path: Path
) -> None:
    math = shutil.copytree(experts["math"], tmp_path / "math")
    folders = {**experts, "math": math}
    out = merge(recipe(folders, tmp_path / "merged"))
    (math / "manifest.json").write_text("{")  # whoever asks for its fingerprint stumbles over this
    with pytest.raises(UserError, match="holds a result made otherwise"):
        merge(recipe(folders, out, lam=0.5))
    with pytest.raises(UserError, match="not a manifest"):
        merge(recipe(folders, out))


def test_overwrite_replaces(experts: Folders, tmp_path: Path) -> None:
    merge(recipe(experts, tmp_path / "merged", max_shard_bytes=60_000))
    out = merge(recipe(experts, tmp_path / "merged", lam=0.5, overwrite=True))
    assert_equal(load(out), in_memory(make_operator("arcee_fusion", {"lam": 0.5}), experts, NESTED))
    assert len(list(out.glob("*.safetensors"))) == 1
    assert left_behind(tmp_path) == ["merged"]


def test_shards_of_parents_and_of_the_result_change_nothing(experts: Folders, tmp_path: Path) -> None:
    sharded = {name: shutil.copytree(folder, tmp_path / "sharded" / name) for name, folder in experts.items()}
    for folder in sharded.values():
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    whole = merge(recipe(experts, tmp_path / "whole"))
    parts = merge(recipe(sharded, tmp_path / "parts", max_shard_bytes=60_000))
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert_equal(load(parts), load(whole))
    loaded = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (parts, whole)]
    assert_equal(*loaded)


def broken(student: Path, folder: Path, value: float) -> Path:
    """A copy with one bad number in a weight."""
    shutil.copytree(student, folder)
    weights = load(folder)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_parent_is_named_and_nothing_is_left(experts: Folders, tmp_path: Path, value: float) -> None:
    bad = broken(experts["math"], tmp_path / "bad", value)
    (tmp_path / "results").mkdir()
    with pytest.raises(UserError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN") as raised:
        merge(recipe({**experts, "math": bad}, tmp_path / "results" / "merged"))
    assert str(bad) in str(raised.value)
    assert left_behind(tmp_path / "results") == []


def test_infinity_that_all_parents_hold_is_found(experts: Folders, tmp_path: Path) -> None:
    bad = {name: broken(experts["math"], tmp_path / name, float("inf")) for name in ("left", "right")}
    with pytest.raises(UserError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        merge(recipe(bad, tmp_path / "merged", tree=["left", "right"]))


def test_a_broken_backbone_is_named(tiny_student: Path, experts: Folders, tmp_path: Path) -> None:
    bad = broken(tiny_student, tmp_path / "bad", float("nan"))
    with pytest.raises(UserError, match=rf"^{bad}: the tensor \S+ holds NaN or infinity; that model is broken"):
        merge(recipe(experts, tmp_path / "merged", "task_arithmetic", FLAT, base=bad))


@pytest.mark.parametrize(("lost", "said"), [("model.safetensors", "no weights at all"), ("config.json", "config.json")])
def test_a_parent_that_is_no_checkpoint_is_refused(experts: Folders, tmp_path: Path, lost: str, said: str) -> None:
    bad = shutil.copytree(experts["math"], tmp_path / "bad")
    (bad / lost).unlink()
    with pytest.raises(UserError, match=said) as raised:
        merge(recipe({**experts, "math": bad}, tmp_path / "merged"))
    assert str(bad) in str(raised.value)


def test_a_parent_that_is_replaced_meanwhile_is_told(
    experts: Folders, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge reads on what it opened, and the manifest would name the weights that have the name now."""
    folders = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in experts.items()}
    usual = stream._pass

    def replacing(*given: Any) -> None:
        usual(*given)
        perturbed(tiny_student, tmp_path / "new", seed=9)
        (tmp_path / "new" / "model.safetensors").replace(folders["math"] / "model.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(stream, "_pass", replacing)
        with pytest.raises(UserError, match=r"math: was changed while it was merged; run the same command again"):
            merge(recipe(folders, tmp_path / "out"))
    assert left_behind(tmp_path).count("out") == 0
    merge(recipe(folders, tmp_path / "out"))


def test_a_result_that_lost_a_shard_is_not_done(experts: Folders, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_shard_bytes": 20_000}
    out = merge(recipe(experts, tmp_path / "out", **settings))
    sorted(out.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=r"finished once, but .*-00002-of-.*: named in .* but not there"):
        merge(recipe(experts, tmp_path / "out", **settings))


def test_what_a_model_is_used_with_is_taken_over(experts: Folders, tmp_path: Path) -> None:
    folders = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in experts.items()}
    for name in ("vocab.txt", "preprocessor_config.json"):
        (folders["code"] / name).write_text("{}")
    out = merge(recipe(folders, tmp_path / "out"))
    assert (out / "vocab.txt").is_file() and (out / "preprocessor_config.json").is_file()


def test_a_shard_that_all_parents_lack_is_missed(tiny_student: Path, tmp_path: Path) -> None:
    for name in ("left", "right"):
        AutoModelForCausalLM.from_pretrained(tiny_student).save_pretrained(tmp_path / name, max_shard_size="60KB")
        sorted((tmp_path / name).glob("*.safetensors"))[1].unlink()
    folders = {name: tmp_path / name for name in ("left", "right")}
    with pytest.raises(UserError, match=r"model-00002-of-"):
        merge(recipe(folders, tmp_path / "merged", tree=["left", "right"]))


def test_two_runs_write_the_same_bytes(experts: Folders, tmp_path: Path) -> None:
    one, two = (merge(recipe(experts, tmp_path / run / "merged", max_shard_bytes=60_000)) for run in "ab")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    differing = [name for name in names if (one / name).read_bytes() != (two / name).read_bytes()]
    assert differing in ([], ["manifest.json"])  # which holds times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arcee_fusion_on_a_cpu_needs_no_torch(experts: Folders, tmp_path: Path, dtype: torch.dtype) -> None:
    """It would cost half as much time again as a small merge."""
    experts = {name: in_another_dtype(experts[name], tmp_path / name, dtype) for name in ("code", "math")}
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [f"tree=[{experts['code']},{experts['math']}]", f"out={tmp_path / 'merged'}", "operator.lam=1.5"]
    done = subprocess.run(
        [sys.executable, "-c", code, "merge.py", *arguments], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_equal(load(tmp_path / "merged"), in_memory(make_operator("arcee_fusion", {}), experts, ["code", "math"]))


def test_parents_stay_as_they_are(experts: Folders, tmp_path: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for folder in experts.values() for path in [folder, *folder.iterdir()]}

    before = state()
    merge(recipe(experts, tmp_path / "merged"))
    assert state() == before


SLOW_MERGE = textwrap.dedent(
    """
    import sys, time
    from dataclasses import dataclass
    from pathlib import Path
    from branchmerge.merge import Recipe, merge
    from branchmerge.merge.operators.arcee_fusion import ArceeFusion
    from branchmerge.merge.tree import parse

    out = Path(sys.argv[1])
    measured = 0

    @dataclass(frozen=True)
    class Slow(ArceeFusion):
        def measure(self, models, base=None):
            global measured
            measured += 1
            if measured >= 20:  # some tensors are done, perhaps not the first ones, for which the writer waits
                time.sleep(2)
                if list(out.with_name(f".{out.name}.partial").glob("*.safetensors")):
                    time.sleep(600)
            return super().measure(models, base)

    folders = {Path(folder).name: Path(folder) for folder in sys.argv[2:]}
    tree = parse(["code", ["science", "math"]])
    merge(Recipe("arcee_fusion", Slow(), tree, folders, out, max_shard_bytes=60_000, progress=False))
    """
)


def test_kill_9_leaves_no_finished_folder_and_the_rerun_succeeds(experts: Folders, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    command = [sys.executable, "-c", SLOW_MERGE, str(out), *map(str, experts.values())]
    worker = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".merged.partial/*.safetensors")):
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    assert not out.exists()
    merge(recipe(experts, out, max_shard_bytes=60_000))
    assert_equal(load(out), in_memory(make_operator("arcee_fusion", {}), experts, NESTED))
    assert left_behind(tmp_path) == ["merged"]
