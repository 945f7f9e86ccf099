"""Write a trained student as a Hugging Face checkpoint whose tokenizer is the backbone's, byte for byte."""

import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from branchmerge.errors import UserError
from branchmerge.files import write_json
from branchmerge.study import fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
"""What a model is used with; of one that also sees, how it gets images too"""
MAX_SHARD_BYTES = 5_000_000_000


def export(
    model: "PreTrainedModel", backbone: Path, out: Path, dtype: "torch.dtype", max_shard_bytes: int = MAX_SHARD_BYTES
) -> str:
    """Save the weights in `dtype`, with the backbone's tokenizer and chat template.

    All processes of a sharded student call this together, and the first one writes; a tensor at a time is whole. Where
    it cannot, all raise its error.

    Returns:
        The fingerprint of the weights' files (`study.weights_sha256`)
    """
    from branchmerge.student import ranks

    weights = as_stored(model, weights_of(model))
    wholes = (_whole(tensor) for tensor in weights.values())

    def write() -> str:
        try:
            sha256 = _write(weights, wholes, out, dtype, max_shard_bytes)
            write_config(backbone, out, type(model).__name__, dtype)
            copy_tokenizer(backbone, out)
            return sha256
        finally:
            _exhaust(wholes)  # of which the others have a share

    if not ranks.is_first():
        _exhaust(wholes)
    return ranks.by_first(write)


def write_config(backbone: Path, out: Path, architecture: str, dtype: "torch.dtype") -> None:
    """The backbone's config.json with what changed, and not as this transformers would write it.

    Its version 5 writes rope_theta by another name, without which version 4, and what builds on it, silently takes
    10,000.
    """
    config = json.loads((backbone / "config.json").read_text())
    config.pop("quantization_config", None)
    name = str(dtype).removeprefix("torch.")
    config |= {"architectures": [architecture], "dtype": name, "torch_dtype": name}
    for part in config.values():
        if isinstance(part, dict):  # the text part of a model that also sees
            part |= {key: name for key in ("dtype", "torch_dtype") if key in part}
    write_json(out / "config.json", config)


def _write(
    weights: "dict[str, torch.Tensor]",
    wholes: "Iterator[torch.Tensor]",
    out: Path,
    dtype: "torch.dtype",
    max_shard_bytes: int,
) -> str:
    """The weights' files; returns their fingerprint."""
    import torch

    from branchmerge.merge.arrays import as_array
    from branchmerge.merge.checkpoint import TensorInfo, Writer

    stored = as_array(torch.empty(0, dtype=dtype)).dtype
    infos = {name: TensorInfo(stored, tuple(tensor.shape)) for name, tensor in weights.items()}
    with Writer(out, infos, max_shard_bytes) as writer:
        for name, whole in zip(weights, wholes, strict=True):
            writer.write(name, as_array(whole.to(dtype)).copy())
    return fingerprint(writer.sha256)


def _exhaust(wholes: "Iterator[torch.Tensor]") -> None:
    import torch

    for whole in wholes:
        if whole.is_cuda:  # else all gathers are asked for at once, and NCCL counts from then on how long each takes
            torch.cuda.synchronize(whole.device)


def check_room(backbone: Path, out: Path, dtype: "torch.dtype") -> None:
    """Refuse a place whose disk has no room for an expert, before it is trained."""
    needed = dtype.itemsize * numbers_in(backbone)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"{out.parent}: the expert will take {needed / 1e9:.2g} GB, the disk has {free / 1e9:.2g} GB left; make"
            " room, or give another out= or outputs="
        )


def numbers_in(checkpoint: Path) -> int:
    """Of its weights' files, all together; raises UserError where one cannot be read."""
    from safetensors import SafetensorError, safe_open

    from branchmerge.merge.shards import weight_files

    numbers = 0
    for path in weight_files(checkpoint):
        try:
            with safe_open(path, framework="np") as file:
                numbers += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error
    return numbers


def weights_of(model: "PreTrainedModel") -> "dict[str, torch.Tensor]":
    """All weights of a checkpoint by their names; one that two layers share only once, by the name of the first."""
    seen: set[int] = set()
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter.detach()
    buffers = {name for name, _ in model.named_buffers()}
    return found | {name: tensor for name, tensor in model.state_dict().items() if name in buffers}


def as_stored(model: "PreTrainedModel", weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """By the names of checkpoints, as merges and vLLM know them: what transformers joins in memory is apart."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, weights) if joins_weights(model) else weights


def joins_weights(model: "PreTrainedModel") -> bool:
    """Whether transformers makes weights of this kind of model of several in the checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def check_finite(model: "PreTrainedModel", where: str) -> None:
    """Raises UserError where a weight is no number; all processes of a sharded student call this together."""
    import torch
    from torch.distributed.tensor import DTensor

    from branchmerge.student import ranks

    local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    broken = [name for name, part in local.items() if not torch.isfinite(part.detach()).all()]
    told = [name for names in ranks.from_all(broken) for name in names]
    if told:
        raise UserError(
            f"{where} {len(set(told))} weights such as {told[0]} hold values that are no numbers, so this is no model;"
            " nothing was published: lower optim.lr, or check backbone and rows"
        )


def _whole(tensor: "torch.Tensor") -> "torch.Tensor":
    """A weight put together from everyone's share."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_tokenizer(source: Path, out: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config byte for byte; returns the names of what was there."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, out / name)
    return names
