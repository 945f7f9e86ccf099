"""What a checkpoint's files hold, compared with the model that its config.json describes; no weight is read."""

from pathlib import Path
from typing import TYPE_CHECKING

from branchmerge.errors import UserError
from branchmerge.merge.checkpoint import Reader
from branchmerge.student.backbone import check_whole
from branchmerge.student.export import joins_weights, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty_model(folder: Path, attn: str | None) -> "PreTrainedModel":
    """The model of a checkpoint in float32, its weights without memory and without values.

    Args:
        attn: transformers' name of an attention; None: its choice for this kind of model
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn)
    model.tie_weights()
    assert isinstance(model, PreTrainedModel)
    return model


def check_stored(folder: Path, model: "PreTrainedModel") -> None:
    """Refuse files in which a weight of the (empty) model is missing or of another shape."""
    stored = Reader(folder)
    if joins_weights(model):
        return
    weights = weights_of(model)
    for name, weight in weights.items():
        if name in stored.tensors and tuple(stored.tensors[name].shape) != tuple(weight.shape):
            raise UserError(
                f"{folder}: {name} has the shape {list(stored.tensors[name].shape)}, by config.json it would have"
                f" {list(weight.shape)}; copy or download it again"
            )
    if not stored.tensors.keys() - weights.keys():
        check_whole(folder, sorted(weights.keys() - stored.tensors.keys()))
