"""recipe.yaml: everything needed to make a merged model again, as exactly as its operator allows.

python merge.py recipe=outputs/demo/merged/ties/recipe.yaml out=/again
"""

from pathlib import Path
from typing import Any

import yaml

from branchmerge.errors import UserError
from branchmerge.files import write_text
from branchmerge.machine import device_of
from branchmerge.merge.operators import make_operator, parameters_of
from branchmerge.merge.recipe import Recipe
from branchmerge.merge.rules import parse_rules
from branchmerge.merge.tree import parse
from branchmerge.study import Manifest

NAME = "recipe.yaml"
HEAD = """# Makes this model again, {again}: python merge.py recipe={name} out=/a/new/folder
# The paths may be edited where the models lie elsewhere; their weights are compared with the SHA-256.
"""


def write(recipe: Recipe, manifest: Manifest, folder: Path) -> None:
    """Write recipe.yaml into the folder of the merged model."""
    from branchmerge import __version__

    known = [{"path": str(Path(parent.path).resolve()), "sha256": parent.weights_sha256} for parent in manifest.parents]
    leaves = recipe.tree.leaves
    content = {
        "branchmerge": __version__,
        "operator": recipe.operator_name,
        "parameters": _plain(parameters_of(recipe.operator)),
        "rules": [rule.entry() for rule in recipe.rules],
        "tree": recipe.tree.nested(),
        "models": dict(zip(leaves, known, strict=False)),
        "base": known[len(leaves)] if len(known) > len(leaves) else None,
        "max_shard_bytes": recipe.max_shard_bytes,
        **({"vocab": recipe.vocab} if recipe.vocab != "same" else {}),
        **({"device": recipe.device} if recipe.device != "cpu" else {}),
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    write_text(folder / NAME, HEAD.format(name=NAME, again=recipe.again) + text)


def load(path: Path, out: Path, *, overwrite: bool = False, progress: bool = True) -> Recipe:
    """Read a recipe; raises UserError if the file is not one."""
    if not path.is_file():
        raise UserError(f"recipe={path}: no such file; a merged model has one, {NAME}")
    try:
        content = yaml.safe_load(path.read_text())
        models, base = content["models"], content["base"]
        operator = make_operator(content["operator"], content["parameters"])
        known = [*models.values(), *([base] if base else [])]
        return Recipe(
            content["operator"], operator, parse(content["tree"]),
            {leaf: Path(model["path"]) for leaf, model in models.items()}, out,
            base=Path(base["path"]) if base else None, max_shard_bytes=int(content["max_shard_bytes"]),
            overwrite=overwrite, progress=progress, config={"recipe": str(path)},
            rules=parse_rules(content["rules"]), vocab=content.get("vocab", "same"), device=_device(content),
            expected={Path(model["path"]): str(model["sha256"]) for model in known},
        )  # fmt: skip
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"recipe={path}: not a recipe of branchmerge ({said})") from error


def _device(content: dict[str, Any]) -> str:
    """The device on which the model was merged; others need not give the same bytes."""
    named = content.get("device", "cpu")
    return named if named == "cpu" else str(device_of(named))  # which asks torch


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
