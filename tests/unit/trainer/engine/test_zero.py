"""DeepSpeed on one process against a plain loop; several processes are in tests/integration."""

import copy

import pytest
import torch
from torch import nn

from trainer.cli import load_config
from trainer.config import Config
from trainer.engine.averages import gamma
from trainer.engine.engine import Engine, StepResult
from trainer.engine.optim import build_optimizer, learning_rate
from trainer.runtime.ranks import join

STAGES = [0, 1, 2, 3]
STEPS = 4


def config(stage: int) -> Config:
    return load_config(
        [
            "+experiment=emoji",
            "train.global_batch_size=6",
            "train.micro_batch_size=3",
            "train.max_steps=10",
            "optim.warmup_steps=2",
            "optim.weight_decay=0.1",
            "optim.max_grad_norm=0.5",
            "ema.decays=[0.5,0.9]",
            "ema.sigma_rels=[0.2]",
            f"deepspeed.stage={stage}",
        ]
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 1))


def micro_batches(step: int) -> list[torch.Tensor]:
    return [
        torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * step + n)) for n in (0, 1)
    ]


def run(engine: Engine, step: int, factor: float = 1.0) -> StepResult:
    for batch in micro_batches(step):
        engine.backward((engine.model(batch) - 1).square().mean() * factor)
    return engine.step(step)


def state(engine: Engine) -> dict[tuple[str, str], torch.Tensor]:
    return {(kind, name): tensor for kind, name, tensor in engine.tensors(engine.kinds)}


@pytest.mark.parametrize("stage", STAGES)
def test_weights_moments_norms_and_ema_are_those_of_a_plain_loop(stage: int) -> None:
    options = config(stage)
    engine = Engine(network(), options, join())
    plain = network()
    optimizer = build_optimizer(options.optim, plain.parameters())
    average, path = copy.deepcopy(plain), []
    for step in range(STEPS):
        result = run(engine, step)
        for batch in micro_batches(step):
            ((plain(batch) - 1).square().mean() / 2).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), options.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.optim, options.train, step)
        optimizer.step()
        optimizer.zero_grad()
        path.append(copy.deepcopy(plain))
        decay = min(0.5, (1 + step) / (10 + step))
        for mean, value in zip(average.parameters(), plain.parameters(), strict=True):
            mean.data.lerp_(value.data, 1 - decay)
        assert result.applied
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    found = state(engine)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found["weight", name], parameter.detach(), atol=1e-6, rtol=1e-5)
        moment = optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(found["exp_avg", name], moment, atol=1e-6, rtol=1e-5)
    for name, parameter in average.named_parameters():
        mean = engine.ema_weights("decay_0.5")[name]
        torch.testing.assert_close(mean, parameter.detach(), atol=1e-6, rtol=1e-5)
    # the profile's integral over each update, of which the average after STEPS is the sum
    edges = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS) ** (gamma(0.2) + 1)
    shares = edges.diff().tolist()
    for name, mean in engine.ema_weights("sigma_rel_0.2").items():
        values = [network.get_parameter(name).detach() for network in path]
        expected = sum(share * value for share, value in zip(shares, values, strict=True))
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-5)
    assert engine.adam_steps() == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_changes_nothing_and_the_next_step_is_taken(
    stage: int,
) -> None:
    engine = Engine(network(), config(stage), join())
    assert run(engine, 0).applied
    before = state(engine)
    assert not run(engine, 1, factor=float("nan")).applied
    after = state(engine)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert run(engine, 2).applied
    assert not torch.equal(state(engine)["weight", "0.weight"], before["weight", "0.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_fresh_engine_goes_on_from_saved_tensors_bit_equal(stage: int) -> None:
    first = Engine(network(), config(stage), join())
    for step in range(2):
        run(first, step)
    saved = state(first)
    assert sum(tensor.nbytes for tensor in saved.values()) == first.num_bytes(first.kinds)
    module = network()
    module.load_state_dict({name: saved["weight", name] for name, _ in module.named_parameters()})
    second = Engine(module, config(stage), join())
    second.load(lambda kind, name: saved[kind, name], first.adam_steps())
    for step in (2, 3):
        assert run(first, step) == run(second, step)
    one, other = state(first), state(second)
    assert all(torch.equal(one[key], other[key]) for key in one)
