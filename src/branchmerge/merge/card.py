"""The model card of a merged model: what it is made of, and how to make it again."""

from pathlib import Path

from branchmerge.merge.anatomy_report import AnatomyText
from branchmerge.merge.recipe import Recipe
from branchmerge.study import Manifest

CARD = """---
library_name: transformers
tags: [merge, branchmerge]
---
# {name}

Made by branchmerge {version} with the operator `{operator}`
and the parameters {parameters}.

Merge tree ([left, right], nested): `{tree}`

| parent | SHA-256 of the weights |
|---|---|
{parents}

{anatomy}
`recipe.yaml` beside this file makes the model again, {again};
`manifest.json` records the configuration and versions, and `tensors.json` what happened to each tensor.
"""


def write(recipe: Recipe, manifest: Manifest, out: Path, anatomy: AnatomyText) -> None:
    """Write README.md into the checkpoint folder."""
    from branchmerge import __version__

    parents = "\n".join(f"| `{parent.path}` | `{parent.weights_sha256}` |" for parent in manifest.parents)
    parameters = ", ".join(f"`{key}={value}`" for key, value in manifest.merge["parameters"].items())
    text = CARD.format(
        name=recipe.name, version=__version__, operator=recipe.operator_name, parameters=parameters,
        tree=recipe.tree.nested(), parents=parents, anatomy=anatomy.markdown,
        again=recipe.again,
    )  # fmt: skip
    (out / "README.md").write_text(text)
