import math

import pytest
import torch
from torch import nn

from trainer.config import LrSchedule, OptimConfig
from trainer.optim import build_optimizer, learning_rate


def test_warm_up_is_linear_and_ends_at_the_full_rate():
    config = OptimConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("schedule", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)]
)
def test_schedules_half_way(schedule: str, half: float):
    config = OptimConfig(lr=1.0, schedule=LrSchedule(schedule), warmup_steps=10)
    assert learning_rate(config, 10, 30) == 1.0
    assert math.isclose(learning_rate(config, 20, 30), half)


def test_decay_spares_biases_and_norms():
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3))
    decayed, spared = build_optimizer(OptimConfig(lr=1.0), module.parameters()).param_groups
    assert [p.dim() for p in decayed["params"]] == [4]
    assert [p.dim() for p in spared["params"]] == [1, 1, 1]
    assert spared["weight_decay"] == 0.0


def test_frozen_parameters_are_left_alone():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    (group,) = build_optimizer(OptimConfig(lr=1.0), module.parameters()).param_groups
    assert [p.shape for p in group["params"]] == [torch.Size([2, 2])]
