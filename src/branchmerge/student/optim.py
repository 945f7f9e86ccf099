"""AdamW and the schedule of the learning rate."""

import math
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from branchmerge.config import OptimConfig


def lr_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Learning rate of a step (counted from 0) as a fraction of the peak.

    Linear from 1/w to 1 over the first w = ceil(warmup_ratio * total_steps) steps, then constant, or half a cosine that
    reaches 0 just after the last step.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, config: OptimConfig, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """AdamW (weight decay on matrices only) and its schedule, one scheduler step per optimizer step."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = _adamw(groups, config)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, total_steps, config.warmup_ratio, config.schedule))
    return optimizer, scheduler


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """torch's fused AdamW, or torchao's with moments in 8 bits.

    Fused is one pass over the weights instead of one per term, several times as fast, on CPUs too
    (benchmarks/fused_adamw.py).
    """
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.betas[0], config.betas[1]), "eps": config.eps}
    if config.optimizer == "adamw":
        return AdamW(groups, **settings, fused=True)
    from torchao.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(groups, **settings)
    return optimizer
