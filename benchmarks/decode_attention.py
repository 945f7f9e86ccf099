"""Generating on a CPU: `decode_sdpa` against transformers' own `sdpa`, side by side in one run; one JSON line.

    python benchmarks/decode_attention.py outputs/demo/backbone

Greedy generation of the same padded prompts (the demo's science questions) in bfloat16; a step is one new token
for every row. The two alternate, and the median of the rounds counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from branchmerge import machine
from branchmerge.config import PROJECT
from branchmerge.data.template import render_prompt
from branchmerge.evaluation.decode_attention import DECODE_SDPA
from branchmerge.student.backbone import load_model, load_tokenizer
from branchmerge.trajectories.schema import Message

ROUNDS, TOKENS = 3, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()

    tokenizer = load_tokenizer(options.checkpoint)
    tokenizer.padding_side = "left"
    lines = (PROJECT / "assets/demo/benchmark/test/science.jsonl").read_text().splitlines()[: options.batch]
    prompts = [render_prompt(tokenizer, [Message("user", json.loads(line)["question"])]) for line in lines]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    models = {name: load_model(options.checkpoint, torch.bfloat16, name) for name in ("sdpa", DECODE_SDPA)}
    steps: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            first, whole = (seconds(model, inputs, count) for count in (1, 1 + TOKENS))
            steps[name].append((whole - first) / TOKENS)
    medians = {name: statistics.median(values) for name, values in steps.items()}
    facts = {
        "benchmark": "decode_attention",
        "batch": len(prompts),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "step_seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio": round(medians["sdpa"] / medians[DECODE_SDPA], 2),
        "torch": torch.__version__,
        "machine": machine.describe(torch.device("cpu")),
    }
    print(json.dumps(facts))


def seconds(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    """Time to generate exactly `tokens` tokens for every row."""
    began = time.perf_counter()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
