import math
from pathlib import Path

import pytest
import torch

from branchmerge.config import OptimConfig
from branchmerge.student.checkpoints import generators, load_state, save_state
from branchmerge.student.optim import lr_factor, make_optimizer


def test_warm_up_rises_linearly_to_the_peak() -> None:
    assert [lr_factor(step, 100, 0.1, "constant") for step in range(10)] == pytest.approx(
        [i / 10 for i in range(1, 11)]
    )


def test_constant_stays_at_the_peak() -> None:
    assert {lr_factor(step, 100, 0.1, "constant") for step in range(10, 100)} == {1.0}


def test_cosine_falls_from_the_peak_towards_zero() -> None:
    factors = [lr_factor(step, 100, 0.1, "cosine") for step in range(10, 101)]
    assert factors[0] == 1.0 and factors[-1] == pytest.approx(0.0, abs=1e-12)
    assert factors[45] == pytest.approx(0.5)
    assert factors == sorted(factors, reverse=True)


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert lr_factor(0, 5, 0.0, "cosine") == 1.0


def test_only_matrices_decay() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer, _ = make_optimizer(layer, OptimConfig(lr=0.1, schedule="constant", weight_decay=0.5), 10)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(layer.weight): 0.5, id(layer.bias): 0.0}
    assert all(group["fused"] for group in optimizer.param_groups)


def test_one_step_is_adamw_by_its_formula() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    config = OptimConfig(lr=0.1, schedule="constant", warmup_ratio=0.0, weight_decay=0.01, betas=(0.9, 0.95), eps=1e-8)
    optimizer, _ = make_optimizer(layer, config, 10)
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None
    g = layer.weight.grad.clone()
    optimizer.step()
    step = (0.1 * g / 0.1) / (math.sqrt(0.05) * g.abs() / math.sqrt(0.05) + 1e-8)
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * (0.01 * before + step))


@pytest.mark.slow
def test_moments_in_8_bits_learn_and_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    """torchao compiles its step, and is not in the environment, because transformers imports it wherever it is."""
    pytest.importorskip("torchao")

    def made() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 64)
        return layer, make_optimizer(layer, OptimConfig(optimizer="adamw_8bit", lr=0.01, schedule="constant"), 10)[0]

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> float:
        loss = (layer(torch.full((2, 256), 0.1)) - 1).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    layer, optimizer = made()
    losses = [step(layer, optimizer) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert optimizer.state[layer.weight]["exp_avg"].codes.dtype == torch.uint8 and layer.weight.dtype == torch.float32
    save_state(tmp_path, layer, optimizer, generators())
    others = made()
    load_state(tmp_path, *others)
    assert step(*others) == step(layer, optimizer)
    assert torch.equal(others[0].weight, layer.weight)
