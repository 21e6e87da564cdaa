import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from trainer.config import LrSchedule, OptimConfig, TrainConfig
from trainer.engine.optim import build_optimizer, describe_peak, learning_rate


def of(max_steps: int, global_batch_size: int = 8) -> TrainConfig:
    return TrainConfig(max_steps=max_steps, global_batch_size=global_batch_size, micro_batch_size=4)


def test_warm_up_is_linear_and_ends_at_the_full_rate() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(config, of(100), step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


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
    rates = [learning_rate(config, of(WARM_UP + DECAY), step) for step in steps]
    assert rates == pytest.approx(torch_rates(schedule))


@pytest.mark.parametrize(
    ("schedule", "quarter", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.75, 0.0), ("cosine", (2 + math.sqrt(2)) / 4, 0.0)],
)
def test_schedules_at_a_quarter_and_at_the_end(schedule: str, quarter: float, end: float) -> None:
    config = OptimConfig(lr=1.0, schedule=LrSchedule(schedule), warmup_steps=10)
    assert learning_rate(config, of(30), 10) == 1.0
    assert learning_rate(config, of(30), 15) == pytest.approx(quarter)
    assert learning_rate(config, of(30), 30) == pytest.approx(end)


def test_a_rate_of_one_sample_is_multiplied_by_the_global_batch_alone() -> None:
    """The published sum: the base rate, the samples of a GPU, the GPUs, the micro batches."""
    config = OptimConfig(lr=2e-6, scale_lr=True, warmup_steps=2, schedule=LrSchedule.linear)
    for gpus, each, accumulated in ((1, 42, 1), (7, 3, 2), (2, 21, 1)):
        published = accumulated * gpus * each * config.lr
        train = of(4, global_batch_size=accumulated * gpus * each)
        rates = [learning_rate(config, train, step) for step in range(4)]
        assert rates == pytest.approx([published * part for part in (0.5, 1.0, 1.0, 0.5)])
    assert describe_peak(config, 42) == "8.4e-05 = optim.lr=2e-06 x 42 samples (optim.scale_lr)"
    assert describe_peak(OptimConfig(lr=2e-6), 42) == "2e-06"


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
