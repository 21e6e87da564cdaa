import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import DiffusionConfig, NoiseSchedule, PredictionType
from models.diffusion.schedules import CLEAN, DiscreteSchedule, build_schedule
from tests.support.oracles import diffusers

DIFFUSERS_SCHEDULE = {
    NoiseSchedule.scaled_linear: "scaled_linear",
    NoiseSchedule.linear: "linear",
    NoiseSchedule.cosine: "squaredcos_cap_v2",
}
UNIFORM = torch.tensor([0.0, 1e-9, 0.1, 0.5, 0.9, 1.0 - 2.0**-53], dtype=torch.float64)


def discrete(**options: Any) -> DiscreteSchedule:
    schedule = build_schedule(DiffusionConfig(**options))
    assert isinstance(schedule, DiscreteSchedule)
    return schedule


@pytest.mark.parametrize("schedule", DIFFUSERS_SCHEDULE)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("num_timesteps", [1000, 64])
def test_discrete_levels_are_diffusers(
    schedule: NoiseSchedule, zero_terminal_snr: bool, num_timesteps: int
) -> None:
    config = DiffusionConfig(
        schedule=schedule, zero_terminal_snr=zero_terminal_snr, num_timesteps=num_timesteps
    )
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=num_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=DIFFUSERS_SCHEDULE[schedule],
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    ours = build_schedule(config)
    signal, noise = ours.levels(torch.arange(num_timesteps))
    expected = theirs.alphas_cumprod.double()
    torch.testing.assert_close(signal.square(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(noise.square(), 1.0 - expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("schedule", DIFFUSERS_SCHEDULE)
def test_zero_terminal_snr_ends_in_pure_noise_and_starts_as_before(schedule: NoiseSchedule) -> None:
    plain = discrete(schedule=schedule).alphas_cumprod
    rescaled = discrete(schedule=schedule, zero_terminal_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0.0
    assert rescaled.sampling_levels(10)[0].noise == 1.0
    assert rescaled.sampling_levels(10)[0].half_log_snr == -math.inf
    assert plain[-1] > 0.0
    torch.testing.assert_close(rescaled.alphas_cumprod[0], plain[0])
    assert (rescaled.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("steps", [3, 7, 30, 75, 999])
def test_discrete_timesteps_are_diffusers_where_steps_do_not_divide(steps: int) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert torch.equal(discrete().sampling_timesteps(steps), scheduler.timesteps)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_discrete_timesteps_descend_evenly_from_the_last(numbers: tuple[int, int]) -> None:
    num_timesteps, steps = numbers
    timesteps = discrete(num_timesteps=num_timesteps).sampling_timesteps(steps).tolist()
    assert len(timesteps) == steps
    assert timesteps[0] == num_timesteps - 1
    gaps = [first - second for first, second in zip(timesteps, [*timesteps[1:], -1], strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1 + (num_timesteps % steps > 0)
    assert all(abs(gap - num_timesteps / steps) <= 1 for gap in gaps)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(NoiseSchedule),
    st.integers(1, 64),
    st.floats(0.2, 8.0),
    st.floats(-2.0, 2.0),
    st.floats(0.1, 3.0),
)
def test_every_schedule_goes_from_noise_to_clean(
    schedule: NoiseSchedule, steps: int, shift: float, mean: float, std: float
) -> None:
    config = DiffusionConfig(
        schedule=schedule, flow_shift=shift, log_sigma_mean=mean, log_sigma_std=std
    )
    ours = build_schedule(config)
    levels = ours.sampling_levels(steps)
    assert len(levels) == steps + 1
    assert levels[-1] is CLEAN
    half_log_snr = [level.half_log_snr for level in levels]
    assert half_log_snr == sorted(half_log_snr)
    assert len(set(half_log_snr)) == steps + 1
    timesteps = ours.draw(UNIFORM)
    signal, noise = ours.levels(timesteps)
    assert signal.shape == noise.shape == timesteps.shape
    assert timesteps.isfinite().all()
    assert (signal.diff() <= 0).all()
    assert (noise.diff() >= 0).all()
    assert (noise > 0).all()
    if schedule is not NoiseSchedule.flow:
        torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal))


@pytest.mark.parametrize("schedule", [NoiseSchedule.edm, NoiseSchedule.flow])
def test_training_noise_is_log_normal(schedule: NoiseSchedule) -> None:
    """The quantiles of log(noise / signal), by the standard library's inverse normal."""
    config = DiffusionConfig(schedule=schedule, log_sigma_mean=-0.5, log_sigma_std=1.2)
    ours = build_schedule(config)
    uniform = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    signal, noise = ours.levels(ours.draw(uniform))
    normal = statistics.NormalDist(-0.5, 1.2)
    expected = torch.tensor([normal.inv_cdf(u) for u in uniform.tolist()])
    torch.testing.assert_close((noise / signal).log().float(), expected, rtol=1e-5, atol=1e-5)


def test_discrete_timesteps_are_drawn_uniformly() -> None:
    uniform = (torch.arange(6400, dtype=torch.float64) + 0.5) / 6400
    timesteps = discrete(num_timesteps=64).draw(uniform)
    assert timesteps.dtype == torch.int64
    assert torch.equal(timesteps.bincount(), torch.full((64,), 100))


def test_flow_noises_as_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ours = build_schedule(
        DiffusionConfig(
            schedule=NoiseSchedule.flow, flow_shift=3.0, prediction_type=PredictionType.flow
        )
    )
    timesteps = ours.sampling_timesteps(4)
    torch.testing.assert_close(timesteps.float(), scheduler.timesteps)
    _, noise = ours.levels(timesteps)
    torch.testing.assert_close(noise.float(), scheduler.sigmas[:-1])


def test_the_shift_moves_training_as_it_moves_sampling() -> None:
    plain, shifted = (
        build_schedule(DiffusionConfig(schedule=NoiseSchedule.flow, flow_shift=shift))
        for shift in (1.0, 3.0)
    )
    for one, other in (
        (plain.draw(UNIFORM[2:5]), shifted.draw(UNIFORM[2:5])),
        (plain.sampling_timesteps(8)[1:], shifted.sampling_timesteps(8)[1:]),
    ):
        (signal, noise), (shifted_signal, shifted_noise) = plain.levels(one), shifted.levels(other)
        torch.testing.assert_close(shifted_noise / shifted_signal, 3.0 * noise / signal)
