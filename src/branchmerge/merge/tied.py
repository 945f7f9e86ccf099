"""Tied embeddings: the output matrix is the input embedding, so a checkpoint with both stores a copy."""

import re
from collections.abc import Mapping

import numpy as np

from branchmerge.errors import UserError
from branchmerge.merge.architecture import is_tied
from branchmerge.merge.arrays import bits
from branchmerge.merge.views import Source, View

HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight$")


def without_copies(models: Mapping[str, Source]) -> dict[str, Source]:
    """The models without the copies that some store, if their configs say that embeddings are tied."""
    heads = {name: [t for t in model.tensors if HEAD.search(t)] for name, model in models.items()}
    if not any(heads.values()) or not is_tied([model.folder for model in models.values()], all(heads.values())):
        return dict(models)
    return {name: _without(name, model, heads[name]) for name, model in models.items()}


def _without(name: str, model: Source, heads: list[str]) -> Source:
    embeddings = [tensor for tensor in model.tensors if EMBEDDING.search(tensor)]
    if len(heads) != 1 or len(embeddings) != 1:  # nothing is stored twice, or it is not clear what is a copy
        return model
    head, embedding = heads[0], embeddings[0]
    shapes = [list(model.tensors[tensor].shape) for tensor in (embedding, head)]
    wrong = f" ({shapes[0]} and {shapes[1]})" if shapes[0] != shapes[1] else ""
    # The few models that store both are read here: dropping a matrix that is not a copy would silently lose it.
    if wrong or not np.array_equal(bits(model.read(embedding)), bits(model.read(head))):
        raise UserError(
            f"{name} ({model.folder}): tie_word_embeddings is true, but {head} differs from {embedding}{wrong};"
            " set it to false in every model's config.json if both are meant, or remove that tensor"
        )
    for tensor in (embedding, head):
        model.release(tensor)
    return View(model, {tensor: info for tensor, info in model.tensors.items() if tensor != head})
