"""A real training step on the CPU, in a process of its own: prints by how many bytes it made the process larger.

python training_memory.py '{"model_type": ...}' TOKENS CHECKPOINTING
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from branchmerge.data.batch import make_batch
from branchmerge.data.template import Document
from branchmerge.student import attention
from branchmerge.student.loss import PackedLoss


def status(key: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def train(shape: dict[str, int], tokens: int, checkpointing: bool) -> None:
    """Two steps: from the second on AdamW has its moments."""
    config = AutoConfig.for_model(**shape, attn_implementation=attention.PACKED_SDPA)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    packed = PackedLoss(model.train())
    optimizer = torch.optim.AdamW(packed.parameters(), lr=1e-5, fused=True)
    row = make_batch([Document("a", np.arange(tokens) % shape["vocab_size"], 1)], tokens)
    for _ in range(2):
        (packed(row) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(packed.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    shape, tokens, checkpointing = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
    train({**shape, "num_hidden_layers": 1, "vocab_size": 128}, 32, checkpointing)  # what libraries take once
    before = status("VmRSS")
    train(shape, tokens, checkpointing)
    print(status("VmHWM") - before)
