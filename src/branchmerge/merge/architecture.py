"""Do two config.json files describe one architecture? All keys are compared, except those that change no computation.

Versions of transformers write different keys for the same model, so where two files differ they are compared again
with the defaults filled in and old names replaced, as transformers does when it loads them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from branchmerge.errors import UserError
from branchmerge.student.backbone import read_config

Config = dict[str, Any]

LOADING = (
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map", "torch_dtype",
    "dtype", "use_cache", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
    "gradient_checkpointing", "pretraining_tp", "chunk_size_feed_forward", "tokenizer_class",
)  # fmt: skip
"""Keys about the origin of a model, and how it is loaded and run."""
TRAINING = (
    "initializer_range", "initializer_factor", "problem_type", "id2label", "label2id", "num_labels", "finetuning_task",
    "task_specific_params", "router_aux_loss_coef", "output_router_logits",
)  # fmt: skip
TOKENS = (
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
    "mask_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
)  # fmt: skip
"""Compared by what the tokenizers say."""
MAY_DIFFER = frozenset((*LOADING, *TRAINING, *TOKENS))
DROPOUT = ("dropout", "_pdrop", "layerdrop", "dropout_prob")


def check_usable(name: str, folder: Path) -> None:
    """Refuse a model that cannot be merged with any other."""
    quantised = read_config(folder).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{name} ({folder}): is quantised ({method}), and codes cannot be merged; give the model in float32 or"
            " bfloat16 that it was made from, or dequantise it with transformers and save it"
        )


def check_same(first: str, a_folder: Path, name: str, b_folder: Path) -> None:
    """Refuse two models of different architectures; says which keys differ, with both values."""
    a, b = read_config(a_folder), read_config(b_folder)
    differing = _differing(a, b, lacking=_LACKING)
    if differing and a.get("model_type") == b.get("model_type"):
        differing = _differing(_complete(a), _complete(b), lacking=None)
    if differing:
        said = ", ".join(f"{key} {_short(x)} and {_short(y)}" for key, x, y in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"{first} and {name} cannot be merged: their architectures differ ({said}{more}); merge fine-tunes of one"
            " backbone, or correct the config.json that is wrong"
        )


def is_tied(folders: Sequence[Path], all_store_heads: bool) -> bool:
    """Whether models of one architecture use their embedding also as output matrix."""
    flags = [_tie_flag(read_config(folder)) for folder in folders]
    said = [flag for flag in flags if flag is not None]
    if said or all_store_heads:
        return any(said)
    return bool(_tie_flag(_complete(read_config(folders[0]))))


def _tie_flag(config: Config) -> bool | None:
    inner = config.get("text_config")
    flag = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
    return None if flag is None else bool(flag)


_LACKING = object()
"""Stands for a missing key, which means its default; that need not be null."""


def _differing(a: Config, b: Config, lacking: object) -> list[tuple[str, Any, Any]]:
    """Keys that differ, with both values; `lacking` is the value of a missing key."""
    one, other = _compared(a), _compared(b)
    keys = sorted(one.keys() | other.keys(), key=lambda key: (key != "model_type", key))
    return [(k, one.get(k), other.get(k)) for k in keys if one.get(k, lacking) != other.get(k, lacking)]


def _compared(config: Config) -> Config:
    """The keys that must be equal, as one flat table."""
    flat = _flat(config, "")
    if not any(key.split(".")[-1] in ("rope_type", "type") and value not in ("default", None)
               for key, value in flat.items()):  # fmt: skip
        flat.pop("max_position_embeddings", None)  # only a limit, unless positions are scaled by it
    if flat.get("use_sliding_window") is False:
        flat.pop("sliding_window", None)
        flat.pop("max_window_layers", None)
    if "rope_parameters.rope_type" in flat:
        flat.pop("rope_parameters.type", None)  # its old name
    return flat


def _flat(config: Config, prefix: str) -> Config:
    found: Config = {}
    for key, value in config.items():
        if key in MAY_DIFFER or str(key).endswith(DROPOUT):
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _complete(config: Config) -> Config:
    """A config as transformers loads it, without ignored keys; unchanged if transformers does not know the model."""
    from transformers import CONFIG_MAPPING  # imported here, as most merges do not need it

    try:
        kind = CONFIG_MAPPING[config["model_type"]]
        known = kind().to_dict()
        return {key: value for key, value in kind.from_dict(dict(config)).to_dict().items() if key in known}
    except Exception:  # a config class may raise anything on unexpected values; then the files are compared
        return config


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
