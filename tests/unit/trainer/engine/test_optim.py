import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from trainer.config import LrSchedule, OptimConfig
from trainer.engine.optim import build_optimizer, learning_rate


def test_warm_up_is_linear_and_ends_at_the_full_rate() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


WARM_UP, DECAY = 10, 20


def torch_rates(schedule: LrSchedule) -> list[float]:
    """The rates of torch's scheduler at each step of the decay."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    if schedule is LrSchedule.cosine:
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=DECAY)
    else:
        end = 0.0 if schedule is LrSchedule.linear else 1.0
        scheduler = lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=DECAY)
    rates = []
    for _ in range(DECAY + 1):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", LrSchedule)
def test_schedules_are_those_of_torch_after_the_warm_up(schedule: LrSchedule) -> None:
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=WARM_UP)
    steps = range(WARM_UP, WARM_UP + DECAY + 1)
    rates = [learning_rate(config, step, WARM_UP + DECAY) for step in steps]
    assert rates == pytest.approx(torch_rates(schedule))


@pytest.mark.parametrize(
    ("schedule", "quarter", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.75, 0.0), ("cosine", (2 + math.sqrt(2)) / 4, 0.0)],
)
def test_schedules_at_a_quarter_and_at_the_end(schedule: str, quarter: float, end: float) -> None:
    config = OptimConfig(lr=1.0, schedule=LrSchedule(schedule), warmup_steps=10)
    assert learning_rate(config, 10, 30) == 1.0
    assert learning_rate(config, 15, 30) == pytest.approx(quarter)
    assert learning_rate(config, 30, 30) == pytest.approx(end)


def test_decay_spares_biases_and_norms() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3))
    decayed, spared = build_optimizer(OptimConfig(lr=1.0), module.parameters()).param_groups
    assert [p.dim() for p in decayed["params"]] == [4]
    assert [p.dim() for p in spared["params"]] == [1, 1, 1]
    assert spared["weight_decay"] == 0.0


def test_frozen_parameters_are_left_alone() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    (group,) = build_optimizer(OptimConfig(lr=1.0), module.parameters()).param_groups
    assert [p.shape for p in group["params"]] == [torch.Size([2, 2])]
