"""Make the golden tensors: run mergekit 0.1.5 on tiny random checkpoints and keep what came out.

Needs an environment of its own (mergekit is LGPL and pins other packages; nothing here is imported by branchmerge):

    python3.11 -m venv /tmp/mk && /tmp/mk/bin/pip install mergekit==0.1.5
    /tmp/mk/bin/python tests/parity/make_goldens.py              all goldens
    /tmp/mk/bin/python tests/parity/make_goldens.py ties slerp   those of some operators

Writes into tests/parity/goldens: `<operator>_*.safetensors` and the mergekit configurations as JSON.
"""

import json
import sys
import tempfile
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
}
"""Our short names of the tensors that are kept -> names of a Llama; mergekit looks at names only, not at shapes."""


def write_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """A folder that mergekit takes for a Llama, holding these tensors and a filler for each of the others."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    some = next(iter(tensors.values()))
    full = {name: torch.ones(8, dtype=some.dtype) for name in LLAMA_NAMES}
    full |= {NAME_IN_CHECKPOINT[name]: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(full, folder / "model.safetensors", metadata={"format": "pt"})


def mergekit(config: dict[str, object], folders: Path, seed: int = 42) -> dict[str, Tensor]:
    """Run one merge; the names of models in `config` are those of folders inside `folders`."""
    with tempfile.TemporaryDirectory() as out:
        text = json.dumps(config).replace("@", f"{folders}/")
        options = MergeOptions(copy_tokenizer=False, random_seed=seed, quiet=True, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(json.loads(text)), out, options)
        merged = {}
        for file in Path(out).glob("*.safetensors"):
            merged |= load_file(file)
    return {name: merged[long] for name, long in NAME_IN_CHECKPOINT.items() if long in merged}


def arcee_fusion() -> None:
    """Two steps of the authors' merge: Left = science, Right = math; then Left = code, Right = that result.

    Without out_dtype mergekit writes float32 here whatever `dtype` says.
    """
    shapes = {"weight": (48, 512), "norm": (512,)}
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(7)
        centre = {
            name: torch.randn(shape, generator=generator) * (0.02 if name == "weight" else 0.05) + (name == "norm")
            for name, shape in shapes.items()
        }
        kept: dict[str, Tensor] = {}
        with tempfile.TemporaryDirectory() as place:
            folders = Path(place)
            for expert in ("science", "math", "code"):
                tensors = {
                    name: (tensor + 3e-4 * torch.randn(tensor.shape, generator=generator)).to(dtype)
                    for name, tensor in centre.items()
                }
                write_checkpoint(folders / expert, tensors)
                kept |= {f"{expert}.{name}": tensor for name, tensor in tensors.items()}
            configs = {}
            for step, left, right in (("step1", "science", "math"), ("step2", "code", "step1")):
                configs[step] = {
                    "merge_method": "arcee_fusion", "base_model": f"@{left}", "models": [{"model": f"@{right}"}],
                    "dtype": str(dtype).removeprefix("torch."), "out_dtype": str(dtype).removeprefix("torch."),
                }  # fmt: skip
                merged = mergekit(configs[step], folders)
                write_checkpoint(folders / step, merged)
                kept |= {f"{step}.{name}": tensor for name, tensor in merged.items()}
        stem = f"arcee_fusion_{str(dtype).removeprefix('torch.')}"
        save_file(kept, GOLDENS / f"{stem}.safetensors")
        (GOLDENS / f"{stem}.json").write_text(json.dumps(configs, indent=1) + "\n")


MAKERS = {"arcee_fusion": arcee_fusion}

if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        MAKERS[name]()
