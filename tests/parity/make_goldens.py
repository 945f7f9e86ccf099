"""Make the golden tensors: run mergekit 0.1.5 on tiny random checkpoints and keep what came out.

Needs an environment of its own (mergekit is LGPL and pins other packages; nothing here is imported by branchmerge):

    python3.11 -m venv /tmp/mk && /tmp/mk/bin/pip install mergekit==0.1.5
    /tmp/mk/bin/python tests/parity/make_goldens.py              all goldens
    /tmp/mk/bin/python tests/parity/make_goldens.py ties slerp   those of some operators
    ATEN_CPU_CAPABILITY=avx2 /tmp/mk/bin/python tests/parity/make_goldens.py arcee_fusion

Arcee Fusion's KL is rounding noise, which depends on the vector instructions that torch uses: its results are kept for
each kind, and the last line makes those of an older processor (avx2, default). Writes into tests/parity/goldens:
`<operator>_*.safetensors` and the mergekit configurations as JSON.
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDENS = Path(__file__).resolve().parent / "goldens"
LAYER = "model.layers.0."
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8,
}  # fmt: skip
LLAMA_NAMES = (
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    *(f"{LAYER}self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"{LAYER}mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight",
)  # fmt: skip
NAME_IN_CHECKPOINT = {
    "weight": f"{LAYER}mlp.down_proj.weight",
    "norm": f"{LAYER}input_layernorm.weight",
    "odd": f"{LAYER}mlp.up_proj.weight",
}
"""Our short names of the tensors that are kept -> names of a Llama; mergekit looks at names only, not at shapes."""


EXPERTS = ("science", "math", "code")
FIRST = "lm_head.weight"
"""The tensor that mergekit merges first: its draw starts at the seed."""
RANDOM = ("dare_linear", "dare_ties", "della")


def write_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """A folder that mergekit takes for a Llama, holding these tensors and a filler for each of the others.

    Args:
        folder: is made
        tensors: by their short names, or by the name in a Llama
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    # Fillers differ between models, as some methods refuse models that are equal to their backbone.
    filler = next(iter(tensors.values())).reshape(-1)[:8]
    full = {name: filler.clone() for name in LLAMA_NAMES}
    full |= {NAME_IN_CHECKPOINT.get(name, name): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(full, folder / "model.safetensors", metadata={"format": "pt"})


def mergekit(config: dict[str, object], folders: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Run one merge and keep the tensors `names`; `@x` in `config` stands for the folder x inside `folders`."""
    with tempfile.TemporaryDirectory() as out:
        text = json.dumps(config).replace("@", f"{folders}/")
        options = MergeOptions(copy_tokenizer=False, random_seed=42, quiet=True, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(json.loads(text)), out, options)
        merged = {}
        for file in Path(out).glob("*.safetensors"):
            merged |= load_file(file)
    return {name: merged[NAME_IN_CHECKPOINT.get(name, name)] for name in names}


def experts(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Fine-tunes of one random backbone, as `<expert>.<tensor>`."""
    generator = torch.Generator().manual_seed(7)
    centre = {
        name: torch.randn(shape, generator=generator) * (0.02 if name == "weight" else 0.05) + (name == "norm")
        for name, shape in shapes.items()
    }
    return {
        f"{expert}.{name}": (tensor + 3e-4 * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for expert in EXPERTS
        for name, tensor in centre.items()
    }


def arcee_fusion() -> None:
    """Two steps of the authors' merge: Left = science, Right = math; then Left = code, Right = that result.

    Without out_dtype mergekit writes float32 here whatever `dtype` says. The experts are made once.
    """
    shapes = {"weight": (48, 512), "norm": (512,)}
    for dtype in (torch.float32, torch.bfloat16):
        stem = f"arcee_fusion_{str(dtype).removeprefix('torch.')}"
        if not (GOLDENS / f"{stem}.safetensors").exists():
            save_file(experts(shapes, dtype), GOLDENS / f"{stem}.safetensors")
        made = load_file(GOLDENS / f"{stem}.safetensors")
        kept: dict[str, Tensor] = {}
        with tempfile.TemporaryDirectory() as place:
            folders = Path(place)
            for expert in EXPERTS:
                write_checkpoint(folders / expert, {name: made[f"{expert}.{name}"] for name in shapes})
            configs = {}
            for step, left, right in (("step1", "science", "math"), ("step2", "code", "step1")):
                configs[step] = {
                    "merge_method": "arcee_fusion", "base_model": f"@{left}", "models": [{"model": f"@{right}"}],
                    "dtype": str(dtype).removeprefix("torch."), "out_dtype": str(dtype).removeprefix("torch."),
                }  # fmt: skip
                merged = mergekit(configs[step], folders, shapes)
                write_checkpoint(folders / step, merged)
                kept |= {f"{step}.{name}": tensor for name, tensor in merged.items()}
        save_file(kept, GOLDENS / f"{stem}_{torch.backends.cpu.get_cpu_capability().lower()}.safetensors")
        (GOLDENS / f"{stem}.json").write_text(json.dumps(configs, indent=1) + "\n")


def fine_tunes(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """A backbone and three models with changes of about a hundredth; some coordinates unchanged, some opposite."""
    generator = torch.Generator().manual_seed(1)
    models: dict[str, dict[str, Tensor]] = {model: {} for model in ("base", "a", "b", "c")}
    for name, shape in {"weight": (16, 24), "norm": (24,), "odd": (7, 5)}.items():
        base = (torch.randn(shape, generator=generator) + (name == "norm")).to(dtype)
        base.view(-1)[:2] = 1.0
        opposite = torch.tensor([2.0**-6, 2.0**-7])
        models["base"][name] = base
        for model in "abc":
            delta = 0.01 * torch.randn(shape, generator=generator)
            delta[torch.rand(shape, generator=generator) < 0.1] = 0
            delta.view(-1)[:2] = {"a": 1, "b": -1, "c": 0}[model] * opposite
            models[model][name] = (base.float() + delta).to(dtype)
    return models


def strangers(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Independent tensors of different norms, at large angles to one another."""
    generator = torch.Generator().manual_seed(2)
    return {
        model: {
            name: (scale * torch.randn(shape, generator=generator)).to(dtype)
            for name, shape in {"weight": (16, 24), "norm": (24,), "odd": (7, 5)}.items()
        }
        for model, scale in (("base", 1.0), ("a", 1.0), ("b", 0.5), ("c", 2.0))
    }


SETS = {
    "near": lambda: fine_tunes(torch.float32),
    "far": lambda: strangers(torch.float32),
    "bf16": lambda: fine_tunes(torch.bfloat16),
}
"""Input sets by name; `inputs_<name>.safetensors` holds each as `<model>.<tensor>`."""

TWO = [{"weight": 1.0}, {"weight": 1.0}]
"""Parameters of each model of a case: those of a, b, ..."""
THREE = [*TWO, {"weight": 1.0}]
WEIGHTED = [{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.45}]


def each(**parameters: float) -> list[dict[str, float]]:
    """Three models of weights 0.5, 0.3, 0.45 that share these parameters."""
    return [{**model, **parameters} for model in WEIGHTED]


# operator -> case -> (input set, parameters of each model, global parameters, has the backbone)
Case = tuple[str, list[dict[str, float]], dict[str, object], bool]
CASES: dict[str, dict[str, Case]] = {
    "linear": {
        "plain": ("near", THREE, {}, False),
        "weighted": ("near", WEIGHTED, {}, False),
        "unnormalised": ("near", WEIGHTED, {"normalize": False}, False),
        "bf16": ("bf16", WEIGHTED, {}, False),
    },
    "task_arithmetic": {
        "plain": ("near", THREE, {}, True),
        "weighted": ("near", WEIGHTED, {}, True),
        "normalised": ("near", WEIGHTED, {"normalize": True}, True),
        "lambda": ("near", WEIGHTED, {"lambda": 0.6}, True),
        "bf16": ("bf16", WEIGHTED, {}, True),
    },
    "slerp": {
        "near": ("near", [{}, {}], {"t": 0.3}, False),
        "far": ("far", [{}, {}], {"t": 0.3}, False),
        "half": ("far", [{}, {}], {"t": 0.5}, False),
        "bf16": ("bf16", [{}, {}], {"t": 0.5}, False),
    },
    "nuslerp": {
        "near": ("near", WEIGHTED[:2], {}, False),
        "far": ("far", WEIGHTED[:2], {}, False),
        "task_vectors": ("near", WEIGHTED[:2], {}, True),
        "task_vectors_far": ("far", WEIGHTED[:2], {}, True),
        "bf16": ("bf16", TWO, {}, False),
    },
    "multislerp": {
        "near": ("near", WEIGHTED, {}, False),
        "far": ("far", WEIGHTED, {}, False),
        "plain": ("far", THREE, {}, False),
        "unnormalised": ("far", WEIGHTED, {"normalize_weights": False}, False),
        "task_vectors": ("near", WEIGHTED, {}, True),
        "two": ("far", WEIGHTED[:2], {}, False),
        "bf16": ("bf16", THREE, {}, False),
    },
    "karcher": {
        "near": ("near", [{}, {}, {}], {}, False),
        "far": ("far", [{}, {}, {}], {}, False),
        "one_step": ("far", [{}, {}, {}], {"max_iter": 1}, False),
        "converged": ("far", [{}, {}, {}], {"max_iter": 100, "tol": 1e-9}, False),
        "two": ("far", [{}, {}], {}, False),
        "bf16": ("bf16", [{}, {}, {}], {}, False),
    },
    "model_stock": {
        "near": ("near", [{}, {}, {}], {}, True),
        "far": ("far", [{}, {}, {}], {}, True),
        "two": ("near", [{}, {}], {}, True),
        "bf16": ("bf16", [{}, {}, {}], {}, True),
    },
    "ties": {
        "plain": ("near", [{**m, "density": 0.2} for m in THREE], {}, True),
        "weighted": ("near", each(density=0.53), {}, True),
        "densities": ("near", [{**m, "density": d} for m, d in zip(WEIGHTED, (0.29, 0.5, 0.7), strict=True)], {}, True),
        "unnormalised": ("near", each(density=0.53), {"normalize": False}, True),
        "lambda": ("near", each(density=0.53), {"lambda": 0.6}, True),
        "negative": ("near", [{"weight": w, "density": 0.5} for w in (0.5, -0.3, 0.4)], {"normalize": False}, True),
        "opposite": ("near", [{**m, "density": 1.0} for m in TWO], {}, True),
        "far": ("far", each(density=0.5), {}, True),
        "bf16": ("bf16", each(density=1.0), {}, True),
        "bf16_sparse": ("bf16", each(density=0.5), {}, True),
    },
    "breadcrumbs": {
        "plain": ("near", [{**m, "density": 0.9, "gamma": 0.01} for m in THREE], {}, True),
        "weighted": ("near", each(density=0.6, gamma=0.15), {}, True),
        "normalised": ("near", each(density=0.6, gamma=0.15), {"normalize": True}, True),
        "lambda": ("near", each(density=0.6, gamma=0.15), {"lambda": 0.6}, True),
        "outliers": ("near", each(density=0.8, gamma=0.5), {}, True),
        "bf16": ("bf16", each(density=0.6, gamma=0.15), {}, True),
    },
    "sce": {
        "plain": ("near", [{}, {}, {}], {}, True),
        "half": ("near", [{}, {}, {}], {"select_topk": 0.53}, True),
        "tenth": ("near", [{}, {}, {}], {"select_topk": 0.1}, True),
        "two": ("near", [{}, {}], {"select_topk": 0.5}, True),
        "far": ("far", [{}, {}, {}], {"select_topk": 0.5}, True),
        "bf16": ("bf16", [{}, {}, {}], {}, True),
    },
    "dare_linear": {
        "one": ("near", [{"weight": 1.0, "density": 0.5}], {"rescale": False}, True),
        "weighted": ("near", each(density=0.53), {"rescale": False}, True),
        "densities": (
            "near", [{**m, "density": d} for m, d in zip(WEIGHTED, (0.29, 0.5, 0.7), strict=True)], {"rescale": False},
            True,
        ),
        "lambda": ("near", each(density=0.53), {"lambda": 0.6, "rescale": False}, True),
        "normalised": ("near", each(density=0.53), {"normalize": True, "rescale": False}, True),
        "rescaled": ("near", each(density=0.53), {}, True),
    },
    "dare_ties": {
        "one": ("near", [{"weight": 1.0, "density": 0.5}], {"rescale": False}, True),
        "weighted": ("near", each(density=0.53), {"rescale": False}, True),
        "normalised": ("near", each(density=0.53), {"normalize": True, "rescale": False}, True),
        "dense": ("near", each(density=1.0), {}, True),
        "rescaled": ("near", each(density=0.53), {}, True),
    },
    "della": {
        "one": ("near", [{"weight": 1.0, "density": 0.5, "epsilon": 0.2}], {"rescale": False}, True),
        "weighted": ("near", each(density=0.53, epsilon=0.1), {"rescale": False}, True),
        "lambda": ("near", each(density=0.53, epsilon=0.1), {"lambda": 0.6, "rescale": False}, True),
        "normalised": ("near", each(density=0.53, epsilon=0.1), {"normalize": True, "rescale": False}, True),
        "unnormalised": ("near", each(density=0.53, epsilon=0.1), {"normalize": False, "rescale": False}, True),
        "rescaled": ("near", each(density=0.53, epsilon=0.1), {"normalize": False}, True),
    },
}  # fmt: skip


def inputs() -> None:
    """The input sets."""
    for name, make in SETS.items():
        kept = {f"{model}.{tensor}": value for model, found in make().items() for tensor, value in found.items()}
        save_file(kept, GOLDENS / f"inputs_{name}.safetensors")


def operator(name: str) -> None:
    """All cases of one operator, as `<case>.<tensor>`; for random ones a merge for each tensor, drawn from the seed."""
    kept, configs = {}, {}
    for case, (inputs_name, models, parameters, has_base) in CASES[name].items():
        tensors = SETS[inputs_name]()
        dtype = str(tensors["a"]["weight"].dtype).removeprefix("torch.")
        config: dict[str, object] = {
            "merge_method": name, "parameters": parameters, "dtype": dtype, "out_dtype": dtype,
            "models": [{"model": f"@{model}", "parameters": own} for model, own in zip("abc", models, strict=False)],
        }  # fmt: skip
        if name == "slerp":
            config["base_model"] = "@a"
        elif has_base:
            config["base_model"] = "@base"
        for group in [[tensor] for tensor in tensors["a"]] if name in RANDOM else [list(tensors["a"])]:
            names = {tensor: FIRST if name in RANDOM else tensor for tensor in group}
            with tempfile.TemporaryDirectory() as place:
                for model, found in tensors.items():
                    write_checkpoint(Path(place) / model, {names[tensor]: found[tensor] for tensor in group})
                merged = mergekit(config, Path(place), names.values())
            kept |= {f"{case}.{tensor}": merged[names[tensor]] for tensor in group}
        configs[case] = {"inputs": inputs_name, "config": config}
    save_file(kept, GOLDENS / f"{name}.safetensors")
    (GOLDENS / f"{name}.json").write_text(json.dumps(configs, indent=1) + "\n")


MAKERS = {"arcee_fusion": arcee_fusion, "inputs": inputs, **{name: partial(operator, name) for name in CASES}}

if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        MAKERS[name]()
