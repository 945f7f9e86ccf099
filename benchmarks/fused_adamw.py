"""One AdamW update of all weights on a CPU: fused against unfused, side by side in one run; one JSON line.

python benchmarks/fused_adamw.py outputs/demo/backbone
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from branchmerge import machine
from branchmerge.student.backbone import load_model

ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    options = parser.parse_args()

    model = load_model(options.checkpoint, torch.float32)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    optimizers = {fused: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused) for fused in (False, True)}
    updates: dict[bool, list[float]] = {fused: [] for fused in optimizers}
    for _ in range(ROUNDS):
        for fused, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            updates[fused].append(time.perf_counter() - began)
    unfused, fused_ = (statistics.median(updates[fused][1:]) for fused in (False, True))  # the first makes the moments
    facts = {
        "benchmark": "fused_adamw",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": {"unfused": round(unfused, 4), "fused": round(fused_, 4)},
        "ratio": round(unfused / fused_, 2),
        "torch": torch.__version__,
        "machine": machine.describe(torch.device("cpu")),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
