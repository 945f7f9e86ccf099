"""Find a branch's backbone, and load checkpoints."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from branchmerge.config import CommonConfig
from branchmerge.errors import UserError
from branchmerge.files import file_sha256
from branchmerge.student.export import TOKENIZER_FILES
from branchmerge.study import MANIFEST, Manifest, Study, is_done, locked, publish, read_manifest

if TYPE_CHECKING:  # imported only where a model is loaded: merging only needs to find the folder
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF = "gguf:"
OTHER_FORMATS = ["original/*", "onnx/*", "consolidated*", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite"]
"""Copies of the weights in other formats, in some repositories of the hub"""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def locate(config: CommonConfig, domain: str | None = None) -> Path:
    """Folder of the checkpoint that `domain` starts from (None: the study's backbone).

    The first that is set of: `backbone.path`; the result of the study's warm-up (except for the warm-up itself);
    `backbone.pretrained`.

    Raises:
        UserError: it is missing, or not a checkpoint
    """
    backbone = config.backbone
    if backbone.path is not None:
        folder = _resolve(config, backbone.path)
    elif config.study.warmup and domain != "warmup":
        folder = Study(config).backbone
        if read_manifest(folder) is None:
            raise UserError(
                f"{folder}: the study {config.study.name} has not made its backbone yet; run python train.py"
                f" study={config.study.name} domain=warmup"
            )
    elif backbone.pretrained is not None:
        folder = _resolve(config, backbone.pretrained)
    else:
        raise UserError(
            f"backbone={backbone.name} has neither path nor pretrained; set backbone.path=/folder/of/a/model"
        )
    check_checkpoint(folder)
    return folder


def find(config: CommonConfig) -> Path | None:
    """Folder of the study's backbone if it is on this machine, else None; converts and downloads nothing."""
    backbone = config.backbone
    if backbone.path is None and config.study.warmup:
        folder = Study(config).backbone
        return folder if (folder / MANIFEST).is_file() else None
    name = backbone.path or backbone.pretrained
    if name is None:
        return None
    folder = Study(config).pretrained(backbone.name) if name.startswith(GGUF) else Path(name).expanduser()
    if not folder.exists() and _is_hub_name(name):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, revision=backbone.revision, local_files_only=True))
        except (OSError, ValueError):  # not in the hub's cache
            return None
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def _is_hub_name(name: str) -> bool:
    return not name.startswith(("/", ".", "~", GGUF)) and name.count("/") == 1


def _resolve(config: CommonConfig, name: str) -> Path:
    """The folder of `name`: a path as it is, gguf:<package> converted once, a hub name downloaded into its cache."""
    if name.startswith(GGUF):
        return import_gguf(config, name.removeprefix(GGUF))
    folder = Path(name).expanduser()
    if folder.exists() or not _is_hub_name(name):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=config.backbone.revision, ignore_patterns=OTHER_FORMATS))
    except Exception as error:
        raise UserError(
            f"{name}: no such folder, and not to be had from the Hugging Face hub"
            f" ({type(error).__name__}: {error}); check the name and the network"
        ) from error


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that is not a Hugging Face checkpoint with safetensors weights."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face checkpoint")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: holds an adapter (LoRA), not a whole model; merge it into its base first (peft:"
            " merge_and_unload, then save_pretrained) and give that folder"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json in it, so it is no Hugging Face checkpoint; give the folder that has one"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for kind in PICKLED for path in folder.glob(kind))
        why = "no weights at all; copy or download them"
        if pickled:
            why = f"only pickled ones ({pickled[0]}), which can run code; convert them where that does no harm"
            why += " (transformers: from_pretrained, then save_pretrained) and give that folder"
        raise UserError(f"{folder}: a checkpoint needs *.safetensors weights; this folder has {why}")
    from branchmerge.merge.shards import weight_files  # which imports this module

    weight_files(folder)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Refuse a tokenizer without chat template or end-of-sequence token, or with more tokens than the model has."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder}: its tokenizer has no chat template; use an instruct model or add chat_template.jinja"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: its tokenizer has no end-of-sequence token, so a student could not learn to stop; set eos_token"
        )
    vocabulary = _of_text(read_config(folder)).get("vocab_size")
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, its model only {vocabulary}; they are of two models"
        )


def context_length(folder: Path) -> int | None:
    """Longest document that the model was made for, in tokens; None if its config does not say."""
    shape = _of_text(read_config(folder))
    lengths = (
        shape.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    )
    return next((length for length in lengths if isinstance(length, int)), None)


def identity(folder: Path) -> dict[str, str]:
    """SHA-256 of what an expert inherits from its backbone besides the weights: config, tokenizer, chat template."""
    files = ("config.json", *TOKENIZER_FILES)
    return {name: file_sha256(folder / name) for name in files if (folder / name).is_file()}


def _of_text(shape: dict[str, Any]) -> dict[str, Any]:
    """The text part of a multimodal model's config; any other config as it is."""
    text: dict[str, Any] = shape.get("text_config") or shape
    return text


def check_heads(shape: dict[str, Any], size: int) -> None:
    """Refuse a model whose heads cannot be divided among the devices that share a row.

    Args:
        shape: the model's config.json
        size: number of devices that share a row
    """
    if not can_share(shape, size):
        heads, pairs = _heads(shape)
        raise UserError(
            f"trainer.context_parallel={size}: the model's num_attention_heads={heads} and num_key_value_heads={pairs}"
            " cannot be dealt out to so many devices equally; choose a divisor of both"
        )


def check_rows(shape: dict[str, Any], seq_len: int) -> None:
    """Refuse packed rows so long that the model would treat the documents in them differently.

    This concerns models that attend within chunks (Llama 4), which packed attention does not support, and models whose
    rotary positions depend on the length of the input (dynamic, longrope).

    Args:
        shape: the model's config.json
    """
    shape = _of_text(shape)
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    usual = rope.get("original_max_position_embeddings") or shape.get("original_max_position_embeddings")
    usual = usual or shape.get("max_position_embeddings")
    if kind in ("dynamic", "longrope") and usual is not None and seq_len > usual:
        raise UserError(
            f"data.seq_len={seq_len}: the model's {kind} positions change in rows longer than {usual} tokens, also for"
            f" the short documents in them; set data.seq_len={usual}"
        )
    chunk = shape.get("attention_chunk_size")
    if chunk is not None and seq_len > chunk:
        raise UserError(
            f"data.seq_len={seq_len}: the model attends within chunks of {chunk} tokens, and packed rows know only"
            f" documents; set data.seq_len={chunk}"
        )


def can_share(shape: dict[str, Any], size: int) -> bool:
    """Whether the heads of a model can be divided among `size` devices."""
    return size == 1 or all(count is not None and count % size == 0 for count in _heads(shape))


def _heads(shape: dict[str, Any]) -> tuple[int | None, int | None]:
    """Number of heads of queries, and of keys and values; None if the model's config names them differently."""
    shape = _of_text(shape)
    heads = shape.get("num_attention_heads")
    return heads, shape.get("num_key_value_heads") or heads


def head_shape(shape: dict[str, Any]) -> tuple[int, int, int] | None:
    """Number of heads of queries and of keys, and their size, by a model's config.json; None if it does not say."""
    heads, pairs = _heads(shape)
    if "qk_rope_head_dim" in _of_text(shape):  # heads of queries and of values differ in size
        return None
    size = _of_text(shape).get("head_dim") or (heads and _of_text(shape).get("hidden_size", 0) // heads)
    return (heads, pairs, size) if heads and pairs and size else None


def score_limits(shape: dict[str, Any]) -> tuple[int | None, float | None]:
    """The sliding window in tokens, and the cap of scores (Gemma 2), by a model's config.json; None for no limit."""
    shape = _of_text(shape)
    window = None if shape.get("use_sliding_window") is False else shape.get("sliding_window")
    return window, shape.get("attn_logit_softcapping")


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json; raises UserError if it is broken."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); copy or download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the JSON of a model's config; copy or download it again")
    return config


def shape_of(config: CommonConfig, checkpoint: Path | None) -> dict[str, Any]:
    """The checkpoint's config.json if there is one, else backbone.shape; empty if backbone.path is not here."""
    if checkpoint is not None:
        return read_config(checkpoint)
    return dict(config.backbone.shape) if config.backbone.path is None else {}


def import_gguf(config: CommonConfig, package: str) -> Path:
    """Convert the GGUF file of an installed package into a checkpoint below outputs/, once; returns its folder."""
    backbone = config.backbone
    folder = Study(config).pretrained(backbone.name)
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(
            f"backbone={backbone.name} is carried by the Python package {package}, which is not"
            " installed; run make setup"
        )
    files = sorted(Path(found.origin).parent.rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"backbone.pretrained: the package {package} holds {len(files)} GGUF files; it must be one")
    work = {"gguf_sha256": file_sha256(files[0])}
    planned = Manifest("pretrained", backbone.name, asdict(backbone), work)
    with locked(folder):
        if not is_done(folder, planned, overwrite=False):
            from branchmerge.student.gguf_file import convert  # imports transformers, so only if needed

            print(f"{folder}: taking the model out of {package}'s {files[0].name}, once", flush=True)
            with publish(folder, planned) as partial:
                convert(files[0], partial)
    return folder


def load_model(folder: Path, dtype: "torch.dtype", attn: str | None = "sdpa") -> "PreTrainedModel":
    """Load a causal LM onto the CPU; raises UserError if the checkpoint lacks some of its weights.

    Args:
        attn: transformers' name of an attention; None: transformers' choice for this kind of model
    """
    from transformers import AutoModelForCausalLM, PreTrainedModel

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attn, use_safetensors=True, output_loading_info=True
    )
    model, found = loaded
    check_whole(folder, sorted(found["missing_keys"]))
    assert isinstance(model, PreTrainedModel)
    return model


def check_whole(folder: Path, missing: list[str]) -> None:
    """Refuse a checkpoint that lacks weights, which transformers would initialise at random."""
    if missing:
        raise UserError(
            f"{folder}: its files lack {len(missing)} of the model's weights, such as {missing[0]}; copy or download it"
            " again"
        )


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn errors of transformers on a checkpoint that it cannot load into a UserError of one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # from many libraries: missing or truncated files, unknown kinds of models, other shapes
        if "attention implementation" in str(error) or "packed_sdpa" in str(error):
            raise UserError(
                f"{folder}: this kind of model cannot train on packed rows, as transformers lets nobody give it an"
                " attention that knows where documents end; take another kind of model"
            ) from error
        raise UserError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: {_first_line(error)}); copy or download it"
            " again, or choose another model"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
