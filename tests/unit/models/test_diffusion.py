from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import BetaSchedule, DiffusionConfig, LossWeight, PredictionType
from models.diffusion import Diffusion
from tests.unit.models.oracles import diffusers

DIFFUSERS_SCHEDULE = {
    BetaSchedule.scaled_linear: "scaled_linear",
    BetaSchedule.linear: "linear",
    BetaSchedule.cosine: "squaredcos_cap_v2",
}


def scheduler(config: DiffusionConfig) -> Any:
    return diffusers.DDPMScheduler(
        num_train_timesteps=config.num_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=DIFFUSERS_SCHEDULE[config.schedule],
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        clip_sample=False,
    )


def draws(timesteps: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(timesteps), 4, 3, 5)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor(timesteps)


@pytest.mark.parametrize("schedule", BetaSchedule)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("num_timesteps", [1000, 64])
def test_schedule_noising_and_velocity_are_diffusers(schedule, zero_terminal_snr, num_timesteps):
    config = DiffusionConfig(
        schedule=schedule, zero_terminal_snr=zero_terminal_snr, num_timesteps=num_timesteps
    )
    ours, theirs = Diffusion(config), scheduler(config)
    assert ours.alphas_cumprod.dtype == torch.float32
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=2e-6)
    latents, noise, timesteps = draws([0, 1, num_timesteps // 2, num_timesteps - 1])
    torch.testing.assert_close(
        ours.add_noise(latents, noise, timesteps),
        theirs.add_noise(latents, noise, timesteps),
        rtol=0,
        atol=5e-5,
    )
    torch.testing.assert_close(
        ours.target(latents, noise, timesteps),
        theirs.get_velocity(latents, noise, timesteps),
        rtol=0,
        atol=5e-5,
    )


@pytest.mark.parametrize("schedule", BetaSchedule)
def test_zero_terminal_snr_ends_in_pure_noise_and_starts_as_before(schedule):
    plain = Diffusion(DiffusionConfig(schedule=schedule))
    rescaled = Diffusion(DiffusionConfig(schedule=schedule, zero_terminal_snr=True))
    assert rescaled.alphas_cumprod[-1] == 0.0
    assert rescaled.noise[-1] == 1.0
    assert plain.alphas_cumprod[-1] > 0.0
    torch.testing.assert_close(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0])
    assert (rescaled.alphas_cumprod.diff() < 0).all()


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(PredictionType),
    st.sampled_from(BetaSchedule),
    st.lists(st.integers(0, 999), min_size=1, max_size=4),
)
def test_the_true_output_is_read_as_the_true_latents_and_noise(prediction, schedule, steps):
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction, schedule=schedule))
    latents, noise, timesteps = draws(steps)
    noisy = diffusion.add_noise(latents, noise, timesteps)
    output = diffusion.target(latents, noise, timesteps)
    denoised, epsilon = diffusion.to_denoised_and_noise(output, noisy, timesteps)
    # Dividing by a small signal or noise magnifies rounding.
    small = torch.minimum(diffusion.signal[timesteps], diffusion.noise[timesteps]).min().item()
    torch.testing.assert_close(denoised, latents, rtol=0, atol=2e-6 / small)
    torch.testing.assert_close(epsilon, noise, rtol=0, atol=2e-6 / small)


def test_velocity_is_read_at_pure_noise():
    diffusion = Diffusion(DiffusionConfig(zero_terminal_snr=True))
    latents, noise, timesteps = draws([999])
    output = diffusion.target(latents, noise, timesteps)
    denoised, epsilon = diffusion.to_denoised_and_noise(output, noise, timesteps)
    torch.testing.assert_close(denoised, latents)
    torch.testing.assert_close(epsilon, noise)


def test_noise_prediction_at_pure_noise_is_refused():
    with pytest.raises(ValueError, match=r"diffusion.zero_terminal_snr .*prediction_type=epsilon"):
        Diffusion(DiffusionConfig(zero_terminal_snr=True, prediction_type=PredictionType.epsilon))


@pytest.mark.parametrize("prediction", PredictionType)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_the_latents_by_the_capped_snr(prediction, gamma):
    """Whatever the prediction type, weight · ‖output error‖² is min(SNR, γ) · ‖x₀ error‖²."""
    config = DiffusionConfig(
        prediction_type=prediction, loss_weight=LossWeight.min_snr, min_snr_gamma=gamma
    )
    diffusion = Diffusion(config)
    latents, noise, timesteps = draws([5, 100, 300, 600, 950])
    noisy = diffusion.add_noise(latents, noise, timesteps).double()
    output = diffusion.target(latents, noise, timesteps).double()
    wrong = output + torch.randn(output.shape, dtype=torch.float64)
    right_latents, _ = diffusion.to_denoised_and_noise(output, noisy, timesteps)
    wrong_latents, _ = diffusion.to_denoised_and_noise(wrong, noisy, timesteps)
    latent_errors = (wrong_latents - right_latents).square().sum(dim=(1, 2, 3))
    output_errors = (wrong - output).square().sum(dim=(1, 2, 3))
    alphas_cumprod = diffusion.alphas_cumprod[timesteps].double()
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    weight = diffusion.loss_weight(timesteps)
    assert weight.shape == timesteps.shape
    torch.testing.assert_close(
        weight * output_errors, snr.clamp(max=gamma) * latent_errors, rtol=1e-4, atol=0
    )


def test_the_uniform_weight_is_one():
    weight = Diffusion(DiffusionConfig()).loss_weight(torch.tensor([0, 500, 999]))
    assert weight.tolist() == [1.0, 1.0, 1.0]
