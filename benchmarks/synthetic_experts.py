"""Fine-tunes of one random backbone, as checkpoints on disk: what merges are timed on where no real experts are.

    python benchmarks/synthetic_experts.py outputs/bench/experts
    python benchmarks/synthetic_experts.py outputs/bench/slice --shape 32b-slice

Writes OUT/<name> for each name: config.json (Qwen2) and model.safetensors, or shards with an index; no tokenizer.
Weights are N(0, 0.02), norms 1 + N(0, 0.02); each expert adds N(0, 3e-4) of its own and is then cast. Every chunk
of a tensor has a seed of its own, so the bytes depend neither on the threads nor on the number of experts, and only
chunks are ever in memory. Each has a manifest.json with the SHA-256 of its weights, as train.py writes it for an
expert. What is there already is kept if it was made with the same arguments.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from branchmerge.files import write_json
from branchmerge.study import MANIFEST, Manifest, weights_sha256

CHUNK = 1 << 22
"""Elements that one thread makes at a time."""
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
"""torch's names -> those of safetensors."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model with untied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the file."""
        hidden, wide, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
                yield f"{prefix}.self_attn.{name}.weight", (rows, hidden)
                yield f"{prefix}.self_attn.{name}.bias", (rows,)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
            yield f"{prefix}.mlp.gate_proj.weight", (wide, hidden)
            yield f"{prefix}.mlp.up_proj.weight", (wide, hidden)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, wide)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab, hidden)

    def config(self, dtype: str) -> dict[str, object]:
        """The model's config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": dtype,
        }


SHAPES = {
    "0.43b": Shape(1024, 4096, 24, 16, 4, 32_000),
    "32b-slice": Shape(5120, 27_648, 1, 40, 8, 152_064),  # R1-Distill-Qwen-32B with one of its 64 layers
}


@dataclass(frozen=True)
class Recipe:
    """All that the bytes depend on, but for the expert's name."""

    shape: Shape
    dtype: str = "bfloat16"
    shard_gb: float = 5.0
    seed: int = 42
    weight_std: float = 0.02
    delta_std: float = 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", nargs="+", default=["science", "math", "code"])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--shape", choices=SHAPES, default="0.43b")
    sizes = list(asdict(SHAPES["0.43b"]))
    for size in sizes:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, help="instead of the shape's")
    options = parser.parse_args()

    given = {size: getattr(options, size) for size in sizes if getattr(options, size) is not None}
    shape = replace(SHAPES[options.shape], **given)
    make(options.out, options.names, Recipe(shape, options.dtype, options.shard_gb, options.seed))


def make(out: Path, names: list[str], recipe: Recipe) -> None:
    """Write the experts that are not there yet."""
    made = json.dumps(asdict(recipe), indent=2)
    records = {name: out / name / "synthetic.json" for name in names}
    missing = [name for name, record in records.items() if not record.is_file() or record.read_text() != made]
    if not missing:
        return
    for name in missing:
        (out / name).mkdir(parents=True, exist_ok=True)
        for old in (out / name).iterdir():
            old.unlink()
        (out / name / "config.json").write_text(json.dumps(recipe.shape.config(recipe.dtype), indent=2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool's threads are the parallel ones
    with ThreadPoolExecutor(threads) as pool:
        _write_shards(out, missing, recipe, pool)
    torch.set_num_threads(threads)
    for name in missing:
        weights = weights_sha256(out / name)
        write_json(out / name / MANIFEST, asdict(Manifest("expert", name, {}, {}, weights_sha256=weights)))
        records[name].write_text(made)  # last: an interrupted expert is made anew


def _write_shards(out: Path, names: list[str], recipe: Recipe, pool: ThreadPoolExecutor) -> None:
    width = torch.empty(0, dtype=getattr(torch, recipe.dtype)).element_size()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in recipe.shape.tensors():
        nbytes = width * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > recipe.shard_gb * 1e9:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + nbytes, total + nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        for expert in names:
            (out / expert / "model.safetensors.index.json").write_text(index)
    for file, shard in zip(files, shards, strict=True):
        _write_shard({name: out / name / file for name in names}, shard, recipe, width, pool)


def _write_shard(
    paths: dict[str, Path], shard: dict[str, tuple[int, ...]], recipe: Recipe, width: int, pool: ThreadPoolExecutor
) -> None:
    """The header, then all chunks of all tensors, each at its place in the file of each expert."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = {}
    end = 0
    for name, shape in shard.items():
        starts[name], end = end, end + width * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[recipe.dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    handles = {name: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name, path in paths.items()}
    try:
        for handle in handles.values():
            os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
        jobs = [
            pool.submit(_write_chunk, handles, recipe, name, place, min(CHUNK, torch.Size(shape).numel() - place),
                        8 + len(text) + starts[name] + place * width)
            for name, shape in shard.items()
            for place in range(0, torch.Size(shape).numel(), CHUNK)
        ]  # fmt: skip
        for job in jobs:
            job.result()
    finally:
        for handle in handles.values():
            os.close(handle)


def _write_chunk(handles: dict[str, int], recipe: Recipe, tensor: str, place: int, count: int, offset: int) -> None:
    def normal(who: str, std: float) -> torch.Tensor:
        digest = hashlib.blake2b(f"{recipe.seed}/{who}/{tensor}/{place}".encode(), digest_size=7).digest()
        return torch.empty(count).normal_(0, std, generator=torch.Generator().manual_seed(int.from_bytes(digest)))

    backbone = normal("", recipe.weight_std)
    if "norm" in tensor:
        backbone += 1
    for name, handle in handles.items():
        weights = normal(name, recipe.delta_std).add_(backbone).to(getattr(torch, recipe.dtype))
        data = weights.view(torch.uint8).numpy().tobytes()
        if os.pwrite(handle, data, offset) != len(data):
            raise OSError(f"{tensor} of {name}: written in part only; is the disk full?")


if __name__ == "__main__":
    main()
