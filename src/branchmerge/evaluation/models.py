"""Which checkpoints to score, and what to call them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from branchmerge.config import EvaluateConfig
from branchmerge.errors import UserError
from branchmerge.student import backbone
from branchmerge.study import Parent, Study, fingerprint, parent_of, read_manifest


@dataclass(frozen=True)
class Model:
    """A checkpoint to score; `name` is its folder below scores/ and its row in the report."""

    name: str
    folder: Path | None
    """None for a model that only its servers have"""
    weights: Parent

    @cached_property
    def files(self) -> str:
        """Fingerprint of the other files that decide its responses: config, tokenizer, chat template, end tokens; empty
        if only the servers have them."""
        return "" if self.folder is None else fingerprint(backbone.identity(self.folder))


def find(config: EvaluateConfig) -> list[Model]:
    """The models that `models=` names, or all that the study has; raises UserError where one is missing."""
    study = Study(config)
    if config.backend.kind == "openai":
        return [_served(config, study)]
    asked = config.models if config.models is not None else _all(study)
    if config.models is None:
        for domain in study.experts:
            if f"experts/{domain}" not in asked:
                print(
                    f"note: no expert {domain} yet (python train.py study={study.root.name} domain={domain})",
                    flush=True,
                )
    found = {model.name: model for model in (_find(config, study, name) for name in asked)}
    return list(found.values())  # a model that was named twice is scored once


def _served(config: EvaluateConfig, study: Study) -> Model:
    """The model on the servers; the checkpoint that `models=` names, where it says which one they serve."""
    backend = config.backend
    if not backend.base_urls or not backend.model:
        raise UserError("backend=openai: give backend.base_urls=[http://host:port/v1] and backend.model=its-name-there")
    if config.models is None:
        return Model(f"served/{backend.model.replace('/', '--')}", None, Parent(backend.model, ""))
    if len(config.models) != 1:
        raise UserError(f"models: {len(config.models)} are named, but the servers of backend=openai have one")
    return _find(config, study, config.models[0])


def _all(study: Study) -> list[str]:
    """Backbone, experts, other branches, merged models: those that are finished."""
    trained = {path.parent.name for path in study.expert("*").parent.glob("*/manifest.json")}
    experts = [name for name in study.experts if name in trained]
    others = sorted(trained - set(experts))
    merged = sorted(path.parent.name for path in study.merged("*").parent.glob("*/manifest.json"))
    return ["backbone", *(f"experts/{name}" for name in [*experts, *others]), *(f"merged/{name}" for name in merged)]


def _find(config: EvaluateConfig, study: Study, name: str) -> Model:
    if name == "backbone":
        folder = backbone.locate(config)
        return Model(name, folder, parent_of(folder))
    if "/" not in name and read_manifest(study.expert(name)) is not None:
        name = f"experts/{name}"
    inside = study.root / name
    if name.startswith(("experts/", "merged/")) and not Path(name).is_dir():
        if read_manifest(inside) is None:
            raise UserError(f"models: {name} is not finished at {inside}; there is {', '.join(_all(study))}")
        return Model(name, inside, parent_of(inside))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"models: {name} is neither backbone, experts/<domain>, merged/<name> nor a folder")
    backbone.check_checkpoint(folder)
    weights = parent_of(folder)
    # Two folders may be called alike; their weights tell them apart.
    return Model(f"others/{folder.resolve().name}-{weights.weights_sha256[:8]}", folder, weights)
