"""A student spread over the devices of a training: FSDP2, a group for each decoder layer and one for the rest.

Every device holds its share of the float32 weights, gradients and moments; a layer is put together in the compute dtype
where it is needed and let go after it. Gradients are summed in float32.
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
    """How a student is spread."""

    compute: torch.dtype
    """Of the matrix products: float32 or bfloat16"""
    replicate: int = 1
    """Copies of the whole set of shards; 1: every device holds another share (FSDP), more: HSDP"""
    cpu_offload: bool = False
    """Shares of weights and moments lie in the CPU's memory"""

    def mesh(self, device: str, world: int) -> DeviceMesh:
        """The devices, [world], or [replicate, world / replicate]."""
        if self.replicate == 1:
            return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
        shape = (self.replicate, world // self.replicate)
        return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


class Spread(ModelParallelStrategy):
    """Lightning's strategy for models that shard themselves, for one that also knows where its weights belong."""

    def __init__(self, world: int) -> None:
        super().__init__(data_parallel_size=world, tensor_parallel_size=1)

    def model_to_device(self) -> None:
        """`load_weights` has done that."""


def check_weights(folder: Path, sharded: bool, recomputed: bool = False) -> None:
    """Refuse a checkpoint that cannot be trained as its config.json says, from the headers of its files.

    Raises:
        UserError: an unknown kind of model, or one without hidden states, or one that shall be `sharded` or its
            activations `recomputed` and cannot; a weight is missing or of another shape, or stored as tied and yet
            another
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
    """The decoder layers of a causal LM; of one that also sees, those of its language model."""
    base = getattr(model, "base_model", model)
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    for part in (decoder or base, *base.modules()):
        for name in ("layers", "h"):  # "h": GPT-2 and its like
            found = getattr(part, name, None)
            if isinstance(found, nn.ModuleList):
                return found
    raise UserError(f"{type(model).__name__} has no list of decoder layers, so it cannot be sharded by layer")


def compile_layers(model: PreTrainedModel) -> None:
    """By torch.compile, one compilation for all of them."""
    # Layers that look at their number (GPT-2's can) would each be a compilation of their own.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    allow_many_compilations()
    for layer in layers(model):
        layer.compile()


def check_shardable(model: PreTrainedModel) -> None:
    """Refuse a model of which a device could not read its share alone."""
    if joins_weights(model):
        raise UserError(
            f"{type(model).__name__} has other weights in memory than in its checkpoint, so a device cannot read its"
            " share alone; train it on one device (trainer.strategy=single)"
        )
    layers(model)


def shard(root: nn.Module, model: PreTrainedModel, sharding: Sharding, mesh: DeviceMesh) -> None:
    """Cut the weights of `root`, which holds `model` and computes its loss, into shares; they may have no memory yet.

    `root` must be what is called in training: the weights that belong to no layer are whole only inside its forward.
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
    """To the weights of an empty model; what has values, the tables of positions, is where `fully_shard` put it."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    model.tie_weights()


def load_weights(model: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Give a sharded, empty model its memory and the checkpoint's weights; each process reads its shares only."""
    give_memory(model, device)
    weights = dict(weights_of(model))
    with tempfile.TemporaryDirectory() as only:  # the reader takes every file that it finds, left-overs too
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
