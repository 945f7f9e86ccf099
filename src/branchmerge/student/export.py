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
"""Files that are copied from the backbone: tokenizer, chat template, generation config and preprocessors of images"""
MAX_SHARD_BYTES = 5_000_000_000


def export(
    model: "PreTrainedModel", backbone: Path, out: Path, dtype: "torch.dtype", max_shard_bytes: int = MAX_SHARD_BYTES
) -> str:
    """Save the weights in `dtype`, with the backbone's tokenizer and chat template.

    All processes of a sharded student call this together. The first one writes, with one tensor gathered at a time; if
    it fails, all raise its error.

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
            _exhaust(wholes)  # even after an error: the other processes take part in gathering each tensor

    if not ranks.is_first():
        _exhaust(wholes)
    return ranks.by_first(write)


def write_config(backbone: Path, out: Path, architecture: str, dtype: "torch.dtype") -> None:
    """Write the backbone's config.json with the changed entries, and not as the installed transformers would write it.

    transformers 5 writes rope_theta under another name; version 4, and what builds on it, would silently use 10,000.
    """
    config = json.loads((backbone / "config.json").read_text())
    config.pop("quantization_config", None)
    name = str(dtype).removeprefix("torch.")
    config |= {"architectures": [architecture], "dtype": name, "torch_dtype": name}
    for part in config.values():
        if isinstance(part, dict):  # the text part of a multimodal model
            part |= {key: name for key in ("dtype", "torch_dtype") if key in part}
    write_json(out / "config.json", config)


def _write(
    weights: "dict[str, torch.Tensor]",
    wholes: "Iterator[torch.Tensor]",
    out: Path,
    dtype: "torch.dtype",
    max_shard_bytes: int,
) -> str:
    """Write the weights' files; returns their fingerprint."""
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
        if whole.is_cuda:  # without waiting, all gathers would be queued at once, and NCCL's timeout runs from then on
            torch.cuda.synchronize(whole.device)


def check_room(backbone: Path, out: Path, dtype: "torch.dtype") -> None:
    """Refuse a disk without room for the expert, before it is trained."""
    needed = dtype.itemsize * numbers_in(backbone)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"{out.parent}: the expert will take {needed / 1e9:.2g} GB, the disk has {free / 1e9:.2g} GB left; make"
            " room, or give another out= or outputs="
        )


def numbers_in(checkpoint: Path) -> int:
    """Number of weights in a checkpoint's files; raises UserError if a file cannot be read."""
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
    """All weights of a checkpoint by name; a weight that two layers share is listed once, by the first one's name."""
    seen: set[int] = set()
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter.detach()
    buffers = {name for name, _ in model.named_buffers()}
    return found | {name: tensor for name, tensor in model.state_dict().items() if name in buffers}


def as_stored(model: "PreTrainedModel", weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The weights as checkpoints store them, for merges and vLLM: those that transformers joins in memory are split."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, weights) if joins_weights(model) else weights


def joins_weights(model: "PreTrainedModel") -> bool:
    """Whether transformers joins several weights of the checkpoint into one for this kind of model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def check_finite(model: "PreTrainedModel", where: str) -> None:
    """Raise UserError if a weight is not finite; all processes of a sharded student call this together."""
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
    """The full weight, gathered from the shares of all processes."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_tokenizer(source: Path, out: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config byte for byte; returns the names of the copied files."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, out / name)
    return names
