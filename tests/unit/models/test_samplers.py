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
from models.diffusion import Diffusion
from models.samplers import Predict, num_steps, sample
from models.schedules import DiscreteSchedule, Level
from tests.unit.models.oracles import diffusers

NOISE = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CONTINUOUS = {NoiseSchedule.edm, NoiseSchedule.flow}
DETERMINISTIC = [name for name in SamplerName if name is not SamplerName.euler_ancestral]
ORDER = {"ddim": 1, "euler": 1, "plms": 2, "heun": 2, "dpmpp_2m": 2, "unipc": 3}
FLOW = DiffusionConfig(schedule=NoiseSchedule.flow, prediction_type=PredictionType.flow)
EDM = DiffusionConfig(schedule=NoiseSchedule.edm)


def randn(generator: torch.Generator) -> Tensor:
    return torch.randn(NOISE.shape, generator=generator, dtype=NOISE.dtype)


def output_of(prediction: PredictionType, denoised: Tensor, noise: Tensor, level: Level) -> Tensor:
    match prediction:
        case PredictionType.epsilon:
            return noise
        case PredictionType.sample:
            return denoised
        case PredictionType.v_prediction:
            return level.signal * noise - level.noise * denoised
        case PredictionType.flow:
            return noise - denoised


def network(prediction: PredictionType) -> Predict:
    """A smooth denoiser with bounded latents, in the output of the prediction type."""

    def predict(latents: Tensor, level: Level) -> Tensor:
        denoised = torch.tanh(torch.einsum("ij,bjhw->bihw", MIX, latents))
        noise = (latents - level.signal * denoised) / level.noise
        return output_of(prediction, denoised, noise, level)

    return predict


class Recorded:
    """A denoiser that remembers what it was asked."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.latents: list[Tensor] = []
        self.levels: list[Level] = []

    def __call__(self, latents: Tensor, level: Level) -> Tensor:
        self.latents.append(latents)
        self.levels.append(level)
        return self.predict(latents, level)


SCALED = {SamplerName.euler, SamplerName.euler_ancestral, SamplerName.heun}
"""diffusers keeps the latents of these as x / α."""
NATIVE = {
    SamplerName.plms: {PredictionType.epsilon},
    SamplerName.euler_ancestral: {PredictionType.epsilon, PredictionType.v_prediction},
    SamplerName.heun: {PredictionType.epsilon, PredictionType.v_prediction},
}
"""What the output may be where diffusers' scheduler does not take epsilon, v and sample."""


def scheduler_of(name: SamplerName, **options: Any) -> Any:
    match name:
        case SamplerName.ddim:
            return diffusers.DDIMScheduler(clip_sample=False, **options)
        case SamplerName.plms:
            return diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True, **options)
        case SamplerName.euler:
            return diffusers.EulerDiscreteScheduler(**options)
        case SamplerName.euler_ancestral:
            return diffusers.EulerAncestralDiscreteScheduler(**options)
        case SamplerName.heun:
            return diffusers.HeunDiscreteScheduler(**options)
        case SamplerName.dpmpp_2m:
            return diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero", **options)
        case SamplerName.unipc:
            return diffusers.UniPCMultistepScheduler(final_sigmas_type="zero", **options)


def assert_every_call_is_theirs(
    scheduler: Any,
    config: DiffusionConfig,
    sampler: SamplerConfig,
    *,
    as_epsilon: bool = False,
    scaled: bool = False,
    start: Tensor | None = None,
    strength: float = 1.0,
    extra: Any = lambda step: {},
) -> None:
    """What the network is asked at each call, and the result, equal diffusers' to 1e-5.

    as_epsilon: the scheduler takes the ε that the output stands for; scaled: its latents are x / α.
    """
    diffusion = Diffusion(config)
    fresh_noise = torch.Generator().manual_seed(5)
    fresh = [randn(fresh_noise) for _ in range(sampler.steps)]
    ours = Recorded(network(config.prediction_type))
    result = sample(
        ours,
        diffusion,
        sampler,
        NOISE,
        start=start,
        strength=strength,
        step_noise=lambda step: fresh[step],
    )
    first = ours.levels[0]
    latents = NOISE if start is None else first.signal * start + first.noise * NOISE
    latents = latents / first.signal if scaled else latents
    timesteps = scheduler.timesteps[-len(ours.levels) :]
    assert len(timesteps) == len(ours.levels)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))
    for step, timestep in enumerate(timesteps):
        asked, level = scheduler.scale_model_input(latents, timestep), ours.levels[step]
        torch.testing.assert_close(torch.tensor(level.timestep), timestep, check_dtype=False)
        assert_close(f"call {step}", ours.latents[step], asked)
        output = ours.predict(asked, level)
        if as_epsilon:
            _, output = diffusion.to_denoised_and_noise(output, asked, level)
        options = extra(step)
        latents = scheduler.step(output, timestep, latents, **options).prev_sample
    assert_close("result", result, latents)


def assert_close(what: str, ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).abs().max().item()
    assert error < 1e-5 * theirs.abs().max().item(), f"{what} differs by {error:.1e}"


@pytest.mark.parametrize("name", SamplerName)
@pytest.mark.parametrize("prediction", PredictionType)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_every_call_is_diffusers(name, prediction, steps):
    assert_discrete_calls_are_diffusers(name, prediction, SamplerConfig(name=name, steps=steps))


@pytest.mark.parametrize("name", [name for name in SamplerName if name is not SamplerName.plms])
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8])
def test_every_call_from_noised_latents_is_diffusers(name, strength):
    """Not plms: its scheduler cannot begin in the middle."""
    prediction = PredictionType.v_prediction
    sampler = SamplerConfig(name=name, steps=20)
    assert_discrete_calls_are_diffusers(
        name, prediction, sampler, start=torch.cos(NOISE), strength=strength
    )


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear, NoiseSchedule.cosine])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_every_ddim_call_is_diffusers(schedule, eta):
    sampler = SamplerConfig(steps=10, eta=eta)
    prediction = PredictionType.v_prediction
    assert_discrete_calls_are_diffusers(SamplerName.ddim, prediction, sampler, schedule=schedule)


@pytest.mark.parametrize("prediction", [PredictionType.v_prediction, PredictionType.sample])
@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_every_ddim_call_from_pure_noise_is_diffusers(prediction, eta):
    sampler = SamplerConfig(steps=20, eta=eta)
    assert_discrete_calls_are_diffusers(
        SamplerName.ddim, prediction, sampler, zero_terminal_snr=True
    )


def assert_discrete_calls_are_diffusers(
    name: SamplerName,
    prediction: PredictionType,
    sampler: SamplerConfig,
    *,
    schedule: NoiseSchedule = NoiseSchedule.scaled_linear,
    zero_terminal_snr: bool = False,
    **how: Any,
) -> None:
    config = DiffusionConfig(
        prediction_type=prediction, schedule=schedule, zero_terminal_snr=zero_terminal_snr
    )
    every = set(PredictionType) - {PredictionType.flow}
    native = prediction in NATIVE.get(name, every)
    cosine = schedule is NoiseSchedule.cosine
    options: dict[str, Any] = {
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if cosine else str(schedule),
        "prediction_type": str(prediction if native else PredictionType.epsilon),
        "timestep_spacing": "trailing",
    }
    if zero_terminal_snr:
        options["rescale_betas_zero_snr"] = True
    scheduler = scheduler_of(name, **options)
    # Theirs are rounded to fp32; test_schedules compares them with ours.
    schedule_of_ours = Diffusion(config).schedule
    assert isinstance(schedule_of_ours, DiscreteSchedule)
    scheduler.alphas_cumprod = schedule_of_ours.alphas_cumprod
    scheduler.set_timesteps(sampler.steps)
    generator = torch.Generator().manual_seed(5)

    def extra(step: int) -> dict[str, Any]:
        if name is SamplerName.ddim:
            return {"eta": sampler.eta, "variance_noise": randn(generator)}
        return {"generator": generator} if name is SamplerName.euler_ancestral else {}

    assert_every_call_is_theirs(
        scheduler,
        config,
        sampler,
        as_epsilon=not native,
        scaled=name in SCALED,
        extra=extra,
        **how,
    )


@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", [SamplerName.euler, SamplerName.ddim])
def test_every_flow_call_is_diffusers(name, shift, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[(steps - step) / steps for step in range(steps)])
    scheduler.scale_model_input = lambda latents, timestep: latents
    config = DiffusionConfig(
        schedule=NoiseSchedule.flow, prediction_type=PredictionType.flow, flow_shift=shift
    )
    sampler = SamplerConfig(name=name, steps=steps)
    assert_every_call_is_theirs(scheduler, config, sampler)


@pytest.mark.parametrize("name", [SamplerName.dpmpp_2m, SamplerName.unipc])
def test_every_multistep_flow_call_is_diffusers(name):
    """From noised latents: diffusers' multistep solvers cannot begin at pure noise."""
    steps, strength = 20, 0.7
    scheduler = scheduler_of(name, use_flow_sigmas=True, prediction_type="flow_prediction")
    taken = num_steps(SamplerConfig(steps=steps), strength)
    scheduler.set_timesteps(taken)
    sigmas = [(taken - step) / steps for step in range(taken + 1)]
    scheduler.sigmas, scheduler.timesteps = torch.tensor(sigmas), 1000 * torch.tensor(sigmas[:-1])
    assert_every_call_is_theirs(
        scheduler,
        FLOW,
        SamplerConfig(name=name, steps=steps),
        start=torch.cos(NOISE),
        strength=strength,
    )


@pytest.mark.parametrize("steps", [1, 5, 25])
@pytest.mark.parametrize("name", [SamplerName.euler, SamplerName.dpmpp_2m])
def test_every_edm_call_is_diffusers(name, steps):
    """Levels, c_in, c_skip, c_out and c_noise of Karras et al. 2022 are in their schedulers."""
    kind = "EDMEuler" if name is SamplerName.euler else "EDMDPMSolverMultistep"
    scheduler = getattr(diffusers, f"{kind}Scheduler")(
        sigma_min=EDM.sigma_min,
        sigma_max=EDM.sigma_max,
        sigma_data=1.0,
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(steps)
    sampler = SamplerConfig(name=name, steps=steps)
    assert_every_call_is_theirs(scheduler, EDM, sampler, scaled=True)


def gaussian_error(config: DiffusionConfig, name: SamplerName, steps: int, shared: float) -> float:
    """Relative distance from the exact flow of data N(0, s²) at the level of timestep `shared`.

    There the best denoiser is linear, x₀ = α s² / (α² s² + σ²) x, and the probability flow keeps
    x / √(α² s² + σ²) (Song et al. 2021b, equation 13). The one step from the last level to clean
    latents is not counted, but for edm: there that level is the same for every number of steps,
    and the final sample is compared with the exact flow, denoised.
    """
    spread, noise = 0.5, NOISE

    def deviation(level: Level) -> float:
        return math.hypot(level.signal * spread, level.noise)

    def denoise(latents: Tensor, level: Level) -> Tensor:
        return level.signal * spread**2 / deviation(level) ** 2 * latents

    def predict(latents: Tensor, level: Level) -> Tensor:
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
def test_the_error_falls_with_the_order_of_the_solver(config, shared, name):
    coarse, fine = (gaussian_error(config, name, steps, shared) for steps in (200, 400))
    slope = math.log2(coarse / fine)
    assert slope > ORDER[name] - 0.15
    # the start of plms is of order 3, and shows where its own error is small
    assert slope < ORDER[name] + (1.6 if name is SamplerName.plms else 0.15)


@pytest.mark.parametrize("name", SamplerName)
@pytest.mark.parametrize("config", [DiffusionConfig(), EDM, FLOW], ids=["ddpm", "edm", "flow"])
def test_the_denoiser_is_asked_as_often_as_stated(name, config):
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
def test_one_point_of_data_is_found_in_any_number_of_steps(name, config, steps):
    """The perfect denoiser of a single point guesses it everywhere, and there is no error left."""
    point = torch.full_like(NOISE, 0.7)

    def predict(latents: Tensor, level: Level) -> Tensor:
        noise = (latents - level.signal * point) / level.noise
        return output_of(config.prediction_type, point, noise, level)

    sampler = SamplerConfig(name=name, steps=steps)
    result = sample(predict, Diffusion(config), sampler, NOISE, step_noise=lambda step: NOISE)
    torch.testing.assert_close(result, point, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.floats(1e-3, 1.0))
def test_strength_is_the_share_of_steps_taken(steps, strength):
    recorded = Recorded(network(PredictionType.v_prediction))
    diffusion = Diffusion(DiffusionConfig())
    sample(recorded, diffusion, SamplerConfig(steps=steps), NOISE, start=NOISE, strength=strength)
    assert len(recorded.levels) == num_steps(SamplerConfig(steps=steps), strength)
    assert 1 <= len(recorded.levels) <= steps
    assert abs(len(recorded.levels) - steps * strength) <= 1
    whole = diffusion.schedule.sampling_levels(steps)
    assert recorded.levels == whole[-1 - len(recorded.levels) : -1]


def test_little_strength_keeps_the_start():
    start = torch.sin(3 * NOISE)

    def distance(strength: float) -> float:
        result = sample(
            lambda latents, level: level.noise * latents / math.hypot(level.signal, level.noise),
            Diffusion(DiffusionConfig(prediction_type=PredictionType.epsilon)),
            SamplerConfig(steps=100),
            NOISE,
            start=start,
            strength=strength,
        )
        return (result - start).norm().item()

    assert 0.0 < distance(0.01) < distance(0.3) < distance(0.9)


def test_on_step_sees_the_guess_of_every_step():
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


def test_a_sample_does_not_depend_on_its_batch():
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
        ({"steps": 0}, "sampler.steps=0 must be positive"),
        ({"steps": 1001}, "sampler.steps=1001: there are only diffusion.num_timesteps=1000"),
        ({"name": SamplerName.dpmpp_2m, "eta": 0.5}, "sampler.eta=0.5 needs sampler.name=ddim"),
        ({"eta": 1.5}, "sampler.eta=1.5 must lie in"),
        ({"eta": 0.5}, "give step_noise"),
        ({"name": SamplerName.euler_ancestral}, "give step_noise"),
        ({"guidance_rescale": 1.1}, "sampler.guidance_rescale=1.1"),
        ({"guidance_interval": [0.5, 0.2]}, r"sampler.guidance_interval=\[0.5, 0.2\]"),
        ({"guidance_interval": [0.5]}, r"sampler.guidance_interval=\[0.5\]"),
    ],
)
def test_options_that_a_solver_cannot_do_are_named(options, message):
    diffusion = Diffusion(DiffusionConfig())
    with pytest.raises(ValueError, match=message):
        sample(network(PredictionType.v_prediction), diffusion, SamplerConfig(**options), NOISE)


def test_continuous_schedules_take_any_number_of_steps():
    for config in (EDM, FLOW):
        recorded = Recorded(network(config.prediction_type))
        sample(recorded, Diffusion(config), SamplerConfig(steps=1001), NOISE)
        assert len(recorded.levels) == 1001


def test_ddim_at_eta_one_forgets_pure_noise_at_once():
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
def test_the_ancestral_sampler_keeps_the_variance_of_the_data(config):
    """With fresh noise each step, unit Gaussian data come out as unit Gaussian."""
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)

    def predict(latents: Tensor, level: Level) -> Tensor:
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
