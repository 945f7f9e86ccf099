"""What Arcee Fusion takes from Right, against the formula in float64: this engine and mergekit; one JSON line.

    python benchmarks/mask_agreement.py --mergekit-bin MERGEKIT_VENV/bin/mergekit-yaml --work outputs/bench

Two synthetic experts with 1024x4096 and 4096x1024 weights and deltas of 3e-4, stored in bfloat16 and in float32.
Compared is the set of coordinates whose value is Right's, by Jaccard overlap (1 is the same set), where Left and
Right differ in the dtype that the engine works in; elsewhere it cannot be seen. The reference always looks at the
stored values, in float64. mergekit draws its quantiles at random, so its figures move by a little from run to run.
"""

import argparse
import json
import statistics
from pathlib import Path

import measure
import torch
from safetensors import safe_open
from torch import Tensor

from branchmerge.merge.operators.arcee_fusion import ArceeFusion

LAM = 1.5
SHAPE = ["--hidden", "1024", "--intermediate", "4096", "--layers", "1", "--vocab", "64", "--names", "left", "right"]
TENSORS = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
DTYPES = ("bfloat16", "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-bin", type=lambda path: Path(path).absolute(), required=True)
    parser.add_argument("--work", type=lambda path: Path(path).absolute(), required=True, help="folder for all files")
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    facts = {
        "benchmark": "mask_agreement",
        "lam": LAM,
        "jaccard": {f"stored in {stored}": compare(stored, options.mergekit_bin, options.work) for stored in DTYPES},
        "cpu": measure.cpu(),
        "versions": measure.versions(options.mergekit_bin),
        "date": measure.today(),
    }
    print(json.dumps(facts))


def compare(stored: str, program: Path, work: Path) -> dict[str, dict[str, float]]:
    """Engine -> overlap with the reference for each tensor, and their median."""
    experts, out = work / f"mask-{stored}", work / "mask-mergekit"
    measure.make_experts(experts, [*SHAPE, "--dtype", stored])
    left, right = (load(experts / name) for name in ("left", "right"))
    references = {name: reference(left[name], right[name]) for name in TENSORS}

    def overlaps(merged: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
        return summary({name: overlap(references[name], left[name], right[name], merged[name], dtype)
                        for name in TENSORS})  # fmt: skip

    ours = {name: ArceeFusion(lam=LAM)([left[name], right[name]]) for name in TENSORS}
    found = {"branchmerge": overlaps(ours, getattr(torch, stored))}
    for dtype in DTYPES:
        measure.mergekit(program, experts / "left", experts / "right", out, work, dtype)
        found[f"mergekit in {dtype}"] = overlaps(load(out), getattr(torch, dtype))
    return found


def load(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in TENSORS}


def reference(left: Tensor, right: Tensor) -> Tensor:
    """Whether the formula takes Right, written down plainly in float64."""
    left, right = left.double(), right.double()
    log_p, log_q = right.log_softmax(-1), left.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
    S = divergence * (left - right).abs()
    ordered = S.flatten().sort().values
    q1, median, q3 = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return median + LAM * (q3 - q1) <= S


def overlap(wanted: Tensor, left: Tensor, right: Tensor, merged: Tensor, dtype: torch.dtype) -> float:
    """Jaccard overlap of the wanted coordinates with those where the merged tensor is nearer to Right.

    Args:
        dtype: what the engine works in; where Left and Right are the same in it, nothing is compared
    """
    a, b = left.to(dtype).double(), right.to(dtype).double()
    taken = (merged.double() - b).abs() < (merged.double() - a).abs()
    wanted = wanted & (a != b)
    return float((wanted & taken).sum() / (wanted | taken).sum())


def summary(overlaps: dict[str, float]) -> dict[str, float]:
    short = {name.split(".")[-2]: round(value, 4) for name, value in overlaps.items()}
    return {"median": round(statistics.median(overlaps.values()), 4), **short}


if __name__ == "__main__":
    main()
