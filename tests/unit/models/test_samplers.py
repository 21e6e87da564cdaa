import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import DiffusionConfig, PredictionType, SamplerConfig, SamplerName
from models.diffusion import Diffusion
from models.samplers import guided, sample, trailing_timesteps
from tests.unit.models.oracles import diffusers

NOISE = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


def network(diffusion: Diffusion):
    """A smooth denoiser with bounded latents, in the output of the prediction type."""

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        denoised = torch.tanh(torch.einsum("ij,bjhw->bihw", MIX, latents))
        signal, sigma = diffusion.signal[timesteps[0]], diffusion.noise[timesteps[0]]
        noise = (latents - signal * denoised) / sigma
        match diffusion.config.prediction_type:
            case PredictionType.epsilon:
                return noise
            case PredictionType.sample:
                return denoised
            case PredictionType.v_prediction:
                return signal * noise - sigma * denoised

    return predict


@pytest.mark.parametrize("prediction", PredictionType)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize(
    ("name", "eta"),
    [(SamplerName.ddim, 0.0), (SamplerName.ddim, 0.6), (SamplerName.dpmpp_2m, 0.0)],
)
def test_every_step_is_diffusers(prediction, steps, name, eta):
    assert_steps_are_diffusers(DiffusionConfig(prediction_type=prediction), steps, name, eta)


@pytest.mark.parametrize("prediction", [PredictionType.v_prediction, PredictionType.sample])
@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_every_ddim_step_from_pure_noise_is_diffusers(prediction, eta):
    config = DiffusionConfig(prediction_type=prediction, zero_terminal_snr=True)
    assert_steps_are_diffusers(config, 20, SamplerName.ddim, eta)


def assert_steps_are_diffusers(
    config: DiffusionConfig, steps: int, name: SamplerName, eta: float
) -> None:
    diffusion = Diffusion(config)
    options = {
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": config.prediction_type,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }
    fresh = [torch.randn(NOISE.shape) for _ in range(steps)]
    if name is SamplerName.ddim:
        scheduler = diffusers.DDIMScheduler(clip_sample=False, **options)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero", **options)
    scheduler.set_timesteps(steps)
    assert trailing_timesteps(1000, steps) == scheduler.timesteps.tolist()
    predict = network(diffusion)
    latents, expected = NOISE, [NOISE]
    for step, timestep in enumerate(scheduler.timesteps):
        output = predict(latents, timestep.expand(len(NOISE)))
        extra = {"eta": eta, "variance_noise": fresh[step]} if name is SamplerName.ddim else {}
        latents = scheduler.step(output, timestep, latents, **extra).prev_sample
        expected.append(latents)
    sampler = SamplerConfig(name=name, steps=steps, eta=eta)
    seen: list[Tensor] = []

    def recorded(latents: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.shape == (len(NOISE),)
        seen.append(latents)
        return predict(latents, timesteps)

    result = sample(recorded, diffusion, sampler, NOISE, step_noise=lambda step: fresh[step])
    for step, (ours, theirs) in enumerate(zip([*seen, result], expected, strict=True)):
        error = (ours - theirs).abs().max().item()
        assert error < 1e-5 * theirs.abs().max().item(), f"step {step} differs by {error:.1e}"


def gaussian_error(name: SamplerName, steps: int, zero_terminal_snr: bool) -> float:
    """Relative distance from the exact flow of data N(0, s²), at timestep 49.

    There the best denoiser is linear, x₀ = α s² / (α² s² + σ²) x, and the probability flow keeps
    x / √(α² s² + σ²) (Song et al. 2021b, equation 13).
    """
    spread, end = 0.5, 49
    diffusion = Diffusion(DiffusionConfig(zero_terminal_snr=zero_terminal_snr))
    deviation = (diffusion.signal.square() * spread**2 + diffusion.noise.square()).sqrt()
    seen: dict[int, Tensor] = {}

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        t = int(timesteps[0])
        seen[t] = latents
        signal, sigma = diffusion.signal[t], diffusion.noise[t]
        return signal * sigma * (1.0 - spread**2) / deviation[t].square() * latents

    sample(predict, diffusion, SamplerConfig(name=name, steps=steps), NOISE)
    exact = NOISE * deviation[end] / deviation[999]
    return ((seen[end] - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(("name", "shrinks_to"), [("ddim", 0.30), ("dpmpp_2m", 0.12)])
def test_solvers_converge_to_the_flow_at_their_order(name, shrinks_to, zero_terminal_snr):
    coarse, fine = (
        gaussian_error(SamplerName(name), steps, zero_terminal_snr) for steps in (40, 160)
    )
    assert fine < shrinks_to * coarse
    assert fine < 0.01


@pytest.mark.parametrize("steps", [3, 7, 30, 75, 999])
def test_trailing_timesteps_are_diffusers_where_steps_do_not_divide(steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert trailing_timesteps(1000, steps) == scheduler.timesteps.tolist()


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_trailing_timesteps_descend_evenly_from_the_last(numbers):
    num_timesteps, steps = numbers
    timesteps = trailing_timesteps(num_timesteps, steps)
    assert len(timesteps) == steps
    assert timesteps[0] == num_timesteps - 1
    gaps = [first - second for first, second in zip(timesteps, [*timesteps[1:], -1], strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1 + (num_timesteps % steps > 0)
    assert all(abs(gap - num_timesteps / steps) <= 1 for gap in gaps)


def test_on_step_sees_the_guess_of_every_step():
    diffusion = Diffusion(DiffusionConfig())
    seen = []
    result = sample(
        network(diffusion),
        diffusion,
        SamplerConfig(steps=7),
        NOISE,
        on_step=lambda step, denoised: seen.append((step, denoised)),
    )
    assert [step for step, _ in seen] == list(range(7))
    torch.testing.assert_close(seen[-1][1], result)
    assert not torch.allclose(seen[0][1], result)


def test_a_sample_does_not_depend_on_its_batch():
    diffusion = Diffusion(DiffusionConfig())
    config = SamplerConfig(steps=10, eta=1.0)
    fresh = torch.randn(10, *NOISE.shape)
    together = sample(
        network(diffusion), diffusion, config, NOISE, step_noise=lambda step: fresh[step]
    )
    alone = sample(
        network(diffusion), diffusion, config, NOISE[1:2], step_noise=lambda s: fresh[s, 1:2]
    )
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "sampler.steps = 0: choose 1 to diffusion.num_timesteps = 1000"),
        ({"steps": 1001}, "sampler.steps = 1001"),
        ({"name": SamplerName.dpmpp_2m, "eta": 0.5}, "sampler.eta = 0.5 needs sampler.name=ddim"),
        ({"eta": 0.5}, "sampler.eta = 0.5 needs step_noise"),
    ],
)
def test_options_that_a_solver_cannot_do_are_named(options, message):
    diffusion = Diffusion(DiffusionConfig())
    with pytest.raises(ValueError, match=message):
        sample(network(diffusion), diffusion, SamplerConfig(**options), NOISE)


class Recorder:
    """A denoiser whose output tells its inputs apart, and which counts its samples."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, latents: Tensor, timesteps: Tensor, context: Tensor | None) -> Tensor:
        self.samples += len(latents)
        shift = 0.0 if context is None else context.sum(dim=(1, 2))[:, None, None, None]
        return latents * timesteps[:, None, None, None] + shift


CONTEXT, NULL = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
TIMESTEPS = torch.tensor([1, 5, 9])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 7.5])
def test_guidance_extrapolates_from_null_in_one_batch(scale):
    unet = Recorder()
    output = guided(unet, CONTEXT, NULL, scale)(NOISE, TIMESTEPS)
    assert unet.samples == 2 * len(NOISE)
    conditional, null = unet(NOISE, TIMESTEPS, CONTEXT), unet(NOISE, TIMESTEPS, NULL)
    torch.testing.assert_close(output, null + scale * (conditional - null), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("context", "null", "scale"), [(CONTEXT, NULL, 1.0), (None, None, 7.5)])
def test_without_guidance_the_null_pass_is_skipped(context, null, scale):
    unet = Recorder()
    output = guided(unet, context, null, scale)(NOISE, TIMESTEPS)
    assert unet.samples == len(NOISE)
    torch.testing.assert_close(output, unet(NOISE, TIMESTEPS, context))


def test_ddim_at_eta_one_forgets_pure_noise_at_once():
    diffusion = Diffusion(DiffusionConfig(zero_terminal_snr=True))
    config = SamplerConfig(steps=5, eta=1.0)
    fresh = torch.randn(5, *NOISE.shape)
    results = [
        sample(
            lambda latents, timesteps: torch.where(timesteps[0] == 999, 0.0, latents),
            diffusion,
            config,
            noise,
            step_noise=lambda step: fresh[step],
        )
        for noise in (NOISE, -NOISE)
    ]
    torch.testing.assert_close(*results)


def test_ddim_at_eta_one_keeps_the_variance_of_the_data():
    """With fresh noise each step, unit Gaussian data come out as unit Gaussian."""
    diffusion = Diffusion(DiffusionConfig())
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    result = sample(
        lambda latents, timesteps: torch.zeros_like(latents),
        diffusion,
        SamplerConfig(steps=200, eta=1.0),
        noise,
        step_noise=lambda step: torch.randn(noise.shape, generator=generator),
    )
    assert math.isclose(result.std().item(), 1.0, abs_tol=0.05)
    assert abs(torch.corrcoef(torch.cat([noise, result], dim=1).T)[0, 1].item()) < 0.2
