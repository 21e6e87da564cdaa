from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import (
    DiffusionConfig,
    NoiseSchedule,
    PredictionType,
    SamplerConfig,
    SamplerName,
)
from models.diffusion.process import Diffusion
from models.diffusion.samplers import Start, num_steps, sample
from models.diffusion.schedules import DiscreteSchedule
from tests.support.denoisers import EDM, FLOW, NOISE, Recorded, network, randn
from tests.support.oracles import diffusers

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
        start=None if start is None else Start(start, strength),
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
def test_every_call_is_diffusers(name: SamplerName, prediction: PredictionType, steps: int) -> None:
    assert_discrete_calls_are_diffusers(name, prediction, SamplerConfig(name=name, steps=steps))


@pytest.mark.parametrize("name", [name for name in SamplerName if name is not SamplerName.plms])
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8])
def test_every_call_from_noised_latents_is_diffusers(name: SamplerName, strength: float) -> None:
    """Not plms: its scheduler cannot begin in the middle."""
    prediction = PredictionType.v_prediction
    sampler = SamplerConfig(name=name, steps=20)
    assert_discrete_calls_are_diffusers(
        name, prediction, sampler, start=torch.cos(NOISE), strength=strength
    )


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear, NoiseSchedule.cosine])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_every_ddim_call_is_diffusers(schedule: NoiseSchedule, eta: float) -> None:
    sampler = SamplerConfig(steps=10, eta=eta)
    prediction = PredictionType.v_prediction
    assert_discrete_calls_are_diffusers(SamplerName.ddim, prediction, sampler, schedule=schedule)


@pytest.mark.parametrize("prediction", [PredictionType.v_prediction, PredictionType.sample])
@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_every_ddim_call_from_pure_noise_is_diffusers(
    prediction: PredictionType, eta: float
) -> None:
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
def test_every_flow_call_is_diffusers(name: SamplerName, shift: float, steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[(steps - step) / steps for step in range(steps)])
    scheduler.scale_model_input = lambda latents, timestep: latents
    config = DiffusionConfig(
        schedule=NoiseSchedule.flow, prediction_type=PredictionType.flow, flow_shift=shift
    )
    sampler = SamplerConfig(name=name, steps=steps)
    assert_every_call_is_theirs(scheduler, config, sampler)


@pytest.mark.parametrize("name", [SamplerName.dpmpp_2m, SamplerName.unipc])
def test_every_multistep_flow_call_is_diffusers(name: SamplerName) -> None:
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
def test_every_edm_call_is_diffusers(name: SamplerName, steps: int) -> None:
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
