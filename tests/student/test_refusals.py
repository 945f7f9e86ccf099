"""What a branch does not train, and says in a line."""

import shutil
from pathlib import Path

import pytest
import torch
from branches import branch
from conftest import make_student
from safetensors.torch import load_file, save_file

from branchmerge.errors import UserError
from branchmerge.student.backbone import locate
from branchmerge.student.training import train
from branchmerge.study import read_manifest


def test_a_checkpoint_that_lacks_a_weight_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "lacking"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    match = r"its files lack 1 of the model's weights, such as model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(UserError, match=match):
        train(branch(folder, tmp_path, "domain=math"))


def test_weights_that_cannot_be_read_are_told_in_a_line(tiny_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "cut"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"cut/model\.safetensors: not a readable safetensors file"):
        train(branch(folder, tmp_path, "domain=math"))


def test_a_branch_does_not_take_the_place_of_its_own_backbone(tiny_student: Path, tmp_path: Path) -> None:
    expert = train(branch(tiny_student, tmp_path, "domain=math"))
    link = tmp_path / "the-same"
    link.symlink_to(expert)
    for out in (expert, link):
        with pytest.raises(UserError, match="is the model that the branch starts from"):
            train(branch(expert, tmp_path, "domain=code", f"out={out}", "overwrite=true"))
    assert read_manifest(expert) is not None


def test_weights_that_are_not_those_of_their_manifest_are_refused(tiny_student: Path, tmp_path: Path) -> None:
    """As a merge's operator would be blamed for what they do; what was trained from them before is done."""
    start = train(branch(tiny_student, tmp_path, "domain=math"))
    done = branch(start, tmp_path, "domain=code")
    train(done)
    content = bytearray((start / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (start / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"its manifest\.json says [0-9a-f]{12}: they were changed or damaged since"):
        train(branch(start, tmp_path, "domain=science"))
    assert train(done) == tmp_path / "tiny" / "experts" / "code"
    (start / "manifest.json").unlink()
    train(branch(start, tmp_path, "domain=science"))


def test_weights_that_are_not_the_configs_are_told_before_any_row_is_graded(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(tiny_student / "model.safetensors")
    changed = {
        "wider": (weights | {"model.norm.weight": torch.ones(33)}, r"model\.norm\.weight has the shape \[33\]"),
        "less": ({n: t for n, t in weights.items() if n != "model.norm.weight"}, "lack 1 of the model's weights"),
        "untied": (weights | {"lm_head.weight": torch.ones(512, 32)}, "tie_word_embeddings is true, but lm_head"),
    }
    for name, (tensors, said) in changed.items():
        folder = Path(shutil.copytree(tiny_student, tmp_path / name))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=said):
            train(branch(folder, tmp_path, "domain=math"))
    assert "kept" not in capsys.readouterr().out


def test_a_kind_of_model_without_hidden_states_of_its_own_is_refused(tmp_path: Path) -> None:
    llama4 = make_student(tmp_path / "llama4", model_type="llama4_text", num_local_experts=2, head_dim=8)
    with pytest.raises(UserError, match="model_type=llama4_text: transformers gives no hidden states"):
        train(branch(llama4, tmp_path, "domain=math"))


def test_a_kind_of_model_whose_activations_cannot_be_computed_again_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jetmoe = make_student(tmp_path / "jetmoe", model_type="jetmoe", num_local_experts=4, kv_channels=8)
    with pytest.raises(UserError, match=r"JetMoeForCausalLM: .* set trainer\.activation_checkpointing=false"):
        train(branch(jetmoe, tmp_path, "domain=math", "trainer.activation_checkpointing=true"))
    assert "kept" not in capsys.readouterr().out
    train(branch(jetmoe, tmp_path, "domain=math"))


def test_debug_replaces_no_expert(tiny_student: Path, tmp_path: Path) -> None:
    out = train(branch(tiny_student, tmp_path, "domain=math", f"out={tmp_path / 'expert'}"))
    before = read_manifest(out)
    with pytest.raises(UserError, match="holds a finished result, which debug= would replace"):
        train(branch(tiny_student, tmp_path, "domain=math", "debug=fast", f"out={out}"))
    assert before is not None and read_manifest(out) == before


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('System role not supported') }}", "TemplateError: System role not supported"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_row_that_the_template_refuses_is_named(template: str, why: str, tiny_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "strict"))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=rf"math-\d+: cannot be written by .* \({why}\)"):
        train(branch(folder, tmp_path, "domain=math"))


@pytest.mark.parametrize(
    ("prepare_folder", "said"),
    [
        ("", "no such folder"),
        ("config.json", r"no weights at all"),
        ("config.json pytorch_model.bin", "only pickled ones"),
        ("model.safetensors", "no config.json"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, prepare_folder: str, said: str) -> None:
    folder = tmp_path / "model"
    for name in prepare_folder.split():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match=said):
        locate(branch(folder, tmp_path, "domain=math"), "math")


def test_a_study_without_its_backbone_says_how_to_make_it(tmp_path: Path) -> None:
    settings = branch(tmp_path, tmp_path, "domain=math", "backbone.path=null")
    with pytest.raises(UserError, match=r"run python train\.py study=tiny domain=warmup"):
        locate(settings, "math")


def test_a_model_without_chat_template_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_student, tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        train(branch(folder, tmp_path, "domain=math"))
    assert not (tmp_path / "tiny" / "experts" / "math").exists()
