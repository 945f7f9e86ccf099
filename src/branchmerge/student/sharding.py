"""Shard a student over the devices of a training by FSDP2, with a group for each decoder layer and one for the rest.

Every device holds its share of the float32 weights, gradients and moments. A layer is gathered in the compute dtype
when it is needed, and freed after it. Gradients are reduced in float32.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from branchmerge.errors import UserError
from branchmerge.merge.checkpoint import Reader
from branchmerge.merge.shards import weight_files
from branchmerge.merge.tied import without_copies
from branchmerge.student.backbone import check_whole, loading
from branchmerge.student.compiling import allow_many_compilations
from branchmerge.student.export import joins_weights, weights_of
from branchmerge.student.loss import check_hidden_states
from branchmerge.student.stored import check_stored, empty_model


@dataclass(frozen=True)
class Sharding:
    """How a student is sharded."""

    compute: torch.dtype
    """dtype of the matrix products: float32 or bfloat16"""
    replicate: int = 1
    """Copies of the whole set of shards; 1: every device holds a different share (FSDP), more: HSDP"""
    cpu_offload: bool = False
    """Keep the shares of weights and moments in the CPU's memory"""

    def mesh(self, device: str, world: int) -> DeviceMesh:
        """The mesh of devices: [world], or [replicate, world / replicate]."""
        if self.replicate == 1:
            return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
        shape = (self.replicate, world // self.replicate)
        return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


class Spread(ModelParallelStrategy):
    """Lightning's strategy for models that shard themselves, where the model also puts its weights on the device."""

    def __init__(self, world: int) -> None:
        super().__init__(data_parallel_size=world, tensor_parallel_size=1)

    def model_to_device(self) -> None:
        """Nothing to do: `load_weights` has put the weights on the device."""


def check_weights(folder: Path, sharded: bool, recomputed: bool = False) -> None:
    """Refuse a checkpoint that cannot be trained, by its config.json and the headers of its weights' files.

    Args:
        sharded: the model must support sharding
        recomputed: the model must support recomputing its activations

    Raises:
        UserError: the kind of model is unknown, has no hidden states, or does not support what is required; a weight is
            missing, has another shape, or is stored in two copies that differ though config.json ties them
    """
    with loading(folder):
        model = empty_model(folder, "sdpa")
    check_hidden_states(model)
    if sharded:
        check_shardable(model)
    if recomputed and not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__}: transformers cannot compute the activations of this kind of model again; set"
            " trainer.activation_checkpointing=false"
        )
    without_copies({"backbone": Reader(folder)})
    check_stored(folder, model)


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM; of a multimodal one, those of its language model."""
    base = getattr(model, "base_model", model)
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    for part in (decoder or base, *base.modules()):
        for name in ("layers", "h"):  # "h": GPT-2 and similar models
            found = getattr(part, name, None)
            if isinstance(found, nn.ModuleList):
                return found
    raise UserError(f"{type(model).__name__} has no list of decoder layers, so it cannot be sharded by layer")


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder layers with torch.compile, by one compilation for all of them."""
    # Layers that read their own index (GPT-2's may) would otherwise each need a compilation.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    allow_many_compilations()
    for layer in layers(model):
        layer.compile()


def check_shardable(model: PreTrainedModel) -> None:
    """Refuse a model whose weights a device cannot read share by share."""
    if joins_weights(model):
        raise UserError(
            f"{type(model).__name__} has other weights in memory than in its checkpoint, so a device cannot read its"
            " share alone; train it on one device (trainer.strategy=single)"
        )
    layers(model)


def shard(root: nn.Module, model: PreTrainedModel, sharding: Sharding, mesh: DeviceMesh) -> None:
    """Shard the weights of `root`, which holds `model` and computes its loss; the weights may have no memory yet.

    `root` must be the module that training calls: weights outside the layers are gathered only inside its forward.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=sharding.compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        if sharding.cpu_offload
        else OffloadPolicy(),
    }
    for layer in layers(model):
        fully_shard(layer, **options)
    fully_shard(root, **options)


def give_memory(model: PreTrainedModel, device: torch.device) -> None:
    """Allocate an empty model's weights; buffers (tables of positions) are already where `fully_shard` put them."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    model.tie_weights()


def load_weights(model: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Allocate a sharded, empty model and load the checkpoint's weights; each process reads only its shares."""
    give_memory(model, device)
    weights = dict(weights_of(model))
    with tempfile.TemporaryDirectory() as only:  # the reader takes every file in a folder, even stale ones
        for path in weight_files(folder):
            (Path(only) / path.name).symlink_to(path.resolve())
        reader = HuggingFaceStorageReader(only)
        stored = reader.read_metadata().state_dict_metadata.keys()
        missing = sorted(weights.keys() - stored)
        others = sorted(stored - weights.keys())
        if missing and others:
            raise UserError(
                f"{folder}: its weights have other names than the model's, such as {others[0]}; save it anew by"
                " transformers (from_pretrained, save_pretrained), or train it on one device"
            )
        check_whole(folder, missing)
        load(weights, storage_reader=reader)
