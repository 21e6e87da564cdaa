"""Samplers on data whose answer is known: order of accuracy, strength, number of calls."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import (
    DiffusionConfig,
    NoiseSchedule,
    PredictionType,
    SamplerConfig,
    SamplerName,
)
from models.config.sampling import SAMPLERS
from models.config.targets import resolve
from models.diffusion.process import Diffusion
from models.diffusion.samplers import Start, num_steps, sample
from models.diffusion.schedules import NoiseLevel
from tests.support.denoisers import DETERMINISTIC, EDM, FLOW, NOISE, Recorded, network, output_of
from tests.support.oracles import diffusers

ORDER = {"ddim": 1, "euler": 1, "plms": 2, "heun": 2, "dpmpp_2m": 2, "unipc": 3}


def gaussian_error(config: DiffusionConfig, name: SamplerName, steps: int, shared: float) -> float:
    """Relative distance from the exact flow of data N(0, s²) at the level of timestep `shared`.

    There the best denoiser is linear, x₀ = α s² / (α² s² + σ²) x, and the probability flow keeps
    x / √(α² s² + σ²) (Song et al. 2021b, equation 13). The one step from the last level to clean
    latents is not counted, but for edm: there that level is the same for every number of steps,
    and the final sample is compared with the exact flow, denoised.
    """
    spread, noise = 0.5, NOISE

    def deviation(level: NoiseLevel) -> float:
        return math.hypot(level.signal * spread, level.noise)

    def denoise(latents: Tensor, level: NoiseLevel) -> Tensor:
        return level.signal * spread**2 / deviation(level) ** 2 * latents

    def predict(latents: Tensor, level: NoiseLevel) -> Tensor:
        denoised = denoise(latents, level)
        epsilon = (latents - level.signal * denoised) / level.noise
        return output_of(config.prediction_type, denoised, epsilon, level)

    network = Recorded(predict)
    result = sample(network, Diffusion(config), SamplerConfig(name=name, steps=steps), noise)
    # heun and plms ask at a level again: the last answer counts
    number = max(
        range(len(network.levels)),
        key=lambda i: (-abs(network.levels[i].timestep - shared), i),
    )
    level, found = network.levels[number], network.latents[number]
    assert level.timestep == pytest.approx(shared)
    exact = noise * deviation(level) / deviation(network.levels[0])
    if config.schedule is NoiseSchedule.edm:
        found, exact = result, denoise(exact, level)
    return ((found - exact).norm() / exact.norm()).item()


DENSE = 3200
"""Enough timesteps to double the steps without rounding."""


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize(
    ("config", "shared"),
    [
        (EDM, math.log(EDM.sigma_min) / 4),
        (FLOW, 1000 / 25),
        *(
            (
                DiffusionConfig(
                    num_timesteps=DENSE,
                    beta_start=0.85 / DENSE,
                    beta_end=12 / DENSE,
                    zero_terminal_snr=zero_terminal_snr,
                ),
                DENSE // 25 - 1,
            )
            for zero_terminal_snr in (False, True)
        ),
    ],
    ids=["edm", "flow", "scaled_linear", "zero_terminal_snr"],
)
def test_the_error_falls_with_the_order_of_the_solver(
    config: DiffusionConfig, shared: int, name: SamplerName
) -> None:
    coarse, fine = (gaussian_error(config, name, steps, shared) for steps in (200, 400))
    slope = math.log2(coarse / fine)
    assert slope > ORDER[name] - 0.15
    # the start of plms is of order 3, and shows where its own error is small
    assert slope < ORDER[name] + (1.6 if name is SamplerName.plms else 0.15)


@pytest.mark.parametrize("name", SamplerName)
@pytest.mark.parametrize("config", [DiffusionConfig(), EDM, FLOW], ids=["ddpm", "edm", "flow"])
def test_the_denoiser_is_asked_as_often_as_stated(
    name: SamplerName, config: DiffusionConfig
) -> None:
    recorded = Recorded(network(config.prediction_type))
    sampler = SamplerConfig(name=name, steps=12)
    sample(recorded, Diffusion(config), sampler, NOISE, step_noise=lambda step: NOISE)
    from_pure_noise = recorded.levels[0].signal == 0.0
    extra = {SamplerName.heun: 11 - from_pure_noise, SamplerName.plms: 1 - from_pure_noise}
    assert len(recorded.levels) == 12 + extra.get(name, 0)


@pytest.mark.parametrize("name", SamplerName)
@pytest.mark.parametrize(
    "config",
    [DiffusionConfig(zero_terminal_snr=True), EDM, FLOW],
    ids=["zero_terminal_snr", "edm", "flow"],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_one_point_of_data_is_found_in_any_number_of_steps(
    name: SamplerName, config: DiffusionConfig, steps: int
) -> None:
    """The perfect denoiser of a single point guesses it everywhere, and there is no error left."""
    point = torch.full_like(NOISE, 0.7)

    def predict(latents: Tensor, level: NoiseLevel) -> Tensor:
        noise = (latents - level.signal * point) / level.noise
        return output_of(config.prediction_type, point, noise, level)

    sampler = SamplerConfig(name=name, steps=steps)
    result = sample(predict, Diffusion(config), sampler, NOISE, step_noise=lambda step: NOISE)
    torch.testing.assert_close(result, point, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.floats(1e-3, 1.0))
def test_strength_is_the_share_of_steps_taken(steps: int, strength: float) -> None:
    recorded = Recorded(network(PredictionType.v_prediction))
    diffusion = Diffusion(DiffusionConfig())
    start = Start(NOISE, strength)
    sample(recorded, diffusion, SamplerConfig(steps=steps), NOISE, start=start)
    assert len(recorded.levels) == num_steps(SamplerConfig(steps=steps), strength)
    assert 1 <= len(recorded.levels) <= steps
    assert abs(len(recorded.levels) - steps * strength) <= 1
    whole = diffusion.schedule.sampling_levels(steps)
    assert recorded.levels == whole[-1 - len(recorded.levels) : -1]


def test_little_strength_keeps_the_start() -> None:
    start = torch.sin(3 * NOISE)

    def distance(strength: float) -> float:
        result = sample(
            lambda latents, level: level.noise * latents / math.hypot(level.signal, level.noise),
            Diffusion(DiffusionConfig(prediction_type=PredictionType.epsilon)),
            SamplerConfig(steps=100),
            NOISE,
            start=Start(start, strength),
        )
        return (result - start).norm().item()

    assert 0.0 < distance(0.01) < distance(0.3) < distance(0.9)


def test_on_step_sees_the_guess_of_every_step() -> None:
    for name in SamplerName:
        seen: list[tuple[int, Tensor]] = []
        result = sample(
            network(PredictionType.v_prediction),
            Diffusion(DiffusionConfig()),
            SamplerConfig(name=name, steps=7),
            NOISE,
            step_noise=lambda step: NOISE,
            on_step=lambda step, denoised, seen=seen: seen.append((step, denoised)),
        )
        assert [step for step, _ in seen] == list(range(7))
        assert not torch.allclose(seen[0][1], result)
        if name is not SamplerName.plms:
            torch.testing.assert_close(seen[-1][1], result)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    fresh = torch.randn(10, *NOISE.shape, dtype=NOISE.dtype)
    for name in SamplerName:
        config = SamplerConfig(name=name, steps=10, eta=1.0 if name is SamplerName.ddim else 0.0)
        together, alone = (
            sample(
                network(PredictionType.v_prediction),
                Diffusion(DiffusionConfig()),
                config,
                NOISE[part],
                step_noise=lambda step, part=part: fresh[step, part],
            )
            for part in (slice(None), slice(1, 2))
        )
        torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "sampler.steps=0 must be an integer ≥ 1"),
        ({"steps": 1001}, "sampler.steps=1001: there are only diffusion.num_timesteps=1000"),
        ({"name": SamplerName.dpmpp_2m, "eta": 0.5}, "sampler.eta=0.5 needs sampler.name=ddim"),
        ({"eta": 1.5}, "sampler.eta=1.5 must be a number"),
        ({"eta": 0.5}, "give step_noise"),
        ({"name": SamplerName.euler_ancestral}, "give step_noise"),
        ({"guidance_rescale": 1.1}, "sampler.guidance_rescale=1.1"),
        ({"guidance_interval": [0.5, 0.2]}, r"sampler.guidance_interval=\[0.5, 0.2\]"),
        ({"guidance_interval": [0.5]}, r"sampler.guidance_interval=\[0.5\]"),
    ],
)
def test_options_that_a_solver_cannot_do_are_named(options: dict[str, Any], message: str) -> None:
    diffusion = Diffusion(DiffusionConfig())
    with pytest.raises(ValueError, match=message):
        sample(network(PredictionType.v_prediction), diffusion, SamplerConfig(**options), NOISE)


def test_continuous_schedules_take_any_number_of_steps() -> None:
    for config in (EDM, FLOW):
        recorded = Recorded(network(config.prediction_type))
        sample(recorded, Diffusion(config), SamplerConfig(steps=1001), NOISE)
        assert len(recorded.levels) == 1001


def test_ddim_at_eta_one_forgets_pure_noise_at_once() -> None:
    diffusion = Diffusion(DiffusionConfig(zero_terminal_snr=True))
    config = SamplerConfig(steps=5, eta=1.0)
    fresh = torch.randn(5, *NOISE.shape, dtype=NOISE.dtype)
    results = [
        sample(
            lambda latents, level: 0.0 * latents if level.timestep == 999 else latents,
            diffusion,
            config,
            noise,
            step_noise=lambda step: fresh[step],
        )
        for noise in (NOISE, -NOISE)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("config", [DiffusionConfig(), EDM, FLOW], ids=["ddpm", "edm", "flow"])
def test_the_ancestral_sampler_keeps_the_variance_of_the_data(config: DiffusionConfig) -> None:
    """With fresh noise each step, unit Gaussian data come out as unit Gaussian."""
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)

    def predict(latents: Tensor, level: NoiseLevel) -> Tensor:
        denoised = level.signal / (level.signal**2 + level.noise**2) * latents
        epsilon = (latents - level.signal * denoised) / level.noise
        return output_of(config.prediction_type, denoised, epsilon, level)

    result = sample(
        predict,
        Diffusion(config),
        SamplerConfig(name=SamplerName.euler_ancestral, steps=200),
        noise,
        step_noise=lambda step: torch.randn(noise.shape, generator=generator),
    )
    assert math.isclose(result.std().item(), 1.0, abs_tol=0.05)
    assert abs(torch.corrcoef(torch.cat([noise, result], dim=1).T)[0, 1].item()) < 0.2


def test_every_sampler_has_an_entry_whose_solver_exists() -> None:
    assert list(SAMPLERS) == list(SamplerName)
    assert all(callable(resolve(entry.solver)) for entry in SAMPLERS.values())
    for entry in SAMPLERS.values():
        assert entry.scheduler is not None
        assert hasattr(diffusers, entry.scheduler.name)
