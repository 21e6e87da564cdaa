"""Every file of conf/deepspeed in both precisions; all of it on one process."""

from itertools import product

import pytest
import torch
from torch import nn

from tests.support.paths import ROOT
from trainer.cli import load_config
from trainer.config import Precision
from trainer.engine.engine import Engine, StepResult
from trainer.runtime.ranks import join

CONF = ROOT / "conf"
FILES = sorted(path.stem for path in (CONF / "deepspeed").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CHOICES = [
    (file, precision)
    for file, precision in product(FILES, ("fp32", "bf16"))
    if (file, precision) != ("zero0", "bf16")
]


def engine(file: str, precision: str) -> Engine:
    config = load_config(
        [
            "+experiment=emoji",
            f"deepspeed={file}",
            f"train.precision={precision}",
            "train.global_batch_size=6",
            "train.micro_batch_size=3",
            "optim.warmup_steps=0",
            "optim.lr=0.1",
        ]
    )
    torch.manual_seed(0)
    return Engine(nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 1)), config, join())


def loss(model: nn.Module, seed: int) -> torch.Tensor:
    batch = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    dtype = next(model.parameters()).dtype
    return (model(batch.to(dtype)).float() - 1).square().mean()


def run(engine: Engine, step: int, factor: float = 1.0) -> tuple[StepResult, list[float]]:
    losses = []
    for number in (0, 1):
        value = loss(engine.model, 2 * step + number)
        engine.backward(value * factor)
        losses.append(value.item())
    return engine.step(step), losses


def state(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in engine.kinds}
    for kind, name, tensor in engine.tensors(engine.kinds):
        found[kind][name] = tensor.clone()
    return found


def assert_equal(
    one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]
) -> None:
    for kind, tensors in one.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other[kind][name]), (kind, name)


@pytest.mark.parametrize(("file", "precision"), CHOICES)
def test_rehearsals_skipped_steps_and_going_back_leave_no_trace(file: str, precision: str) -> None:
    undisturbed, tried = engine(file, precision), engine(file, precision)
    expected = [run(undisturbed, step) for step in range(4)]
    start = state(tried)

    tried.rehearse(lambda model: loss(model, 99))
    assert_equal(state(tried), start)
    assert [run(tried, step) for step in (0, 1)] == expected[:2]

    middle, adam_steps = state(tried), tried.adam_steps()
    result, _ = run(tried, 2, factor=float("nan"))
    assert not result.applied
    assert_equal(state(tried), middle)
    tried.rehearse(lambda model: loss(model, 98))
    assert [run(tried, step) for step in (2, 3)] == expected[2:]
    assert_equal(state(tried), state(undisturbed))

    tried.load(lambda kind, name: middle[kind][name], adam_steps)
    assert_equal(state(tried), middle)
    assert [run(tried, step) for step in (2, 3)] == expected[2:]
    assert_equal(state(tried), state(undisturbed))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_deepspeed_accepts_every_experiment_with_every_choice(experiment: str) -> None:
    for file in FILES:
        options = [f"+experiment={experiment}", f"deepspeed={file}"]
        if file == "zero0" and load_config(options[:1]).train.precision is Precision.bf16:
            with pytest.raises(ValueError, match=r"deepspeed\.stage=0 with train\.precision=bf16"):
                load_config(options)
            options.append("train.precision=fp32")
        if "zero3" in file and experiment == "emoji_autoencoder_gan":
            with pytest.raises(ValueError, match=r"deepspeed\.stage=3 spreads the discriminator"):
                load_config(options)
            continue
        config = load_config(options)
        accepted = Engine(nn.Linear(4, 2), config, join())
        assert accepted.num_bytes(accepted.kinds) == 4 * 10 * len(accepted.kinds)
        dtype = torch.bfloat16 if config.train.precision is Precision.bf16 else torch.float32
        assert next(accepted.module.parameters()).dtype is dtype
        accepted.rehearse(
            lambda model, dtype=dtype: model(torch.ones(1, 4, dtype=dtype)).float().sum()
        )
