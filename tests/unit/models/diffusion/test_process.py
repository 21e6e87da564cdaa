import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import DiffusionConfig, DiffusionLoss, LossWeight, NoiseSchedule, PredictionType
from models.diffusion.process import Diffusion
from models.diffusion.schedules import NoiseLevel
from tests.support.oracles import diffusers

NOT_EPSILON = [kind for kind in PredictionType if kind is not PredictionType.epsilon]


def draws(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 4, 3, 5)
    latents, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return latents, noise


def level_of(diffusion: Diffusion, timestep: Tensor) -> NoiseLevel:
    signal, noise = diffusion.schedule.levels(timestep)
    return NoiseLevel(timestep.item(), signal.item(), noise.item())


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noising_and_velocity_are_diffusers(zero_terminal_snr: bool) -> None:
    config = DiffusionConfig(zero_terminal_snr=zero_terminal_snr)
    theirs = diffusers.DDPMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    ours = Diffusion(config)
    timesteps = torch.tensor([0, 1, 500, 999])
    latents, noise = (tensor.float() for tensor in draws(4))
    noisy = ours.add_noise(latents, noise, timesteps)
    target = ours.target(latents, noise, timesteps)
    assert noisy.dtype == target.dtype == torch.float32
    expected = theirs.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, expected, rtol=0, atol=5e-5)
    expected = theirs.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target, expected, rtol=0, atol=5e-5)


def test_flow_noising_is_diffusers() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    config = DiffusionConfig(schedule=NoiseSchedule.flow, prediction_type=PredictionType.flow)
    ours = Diffusion(config)
    latents, noise = (tensor.float() for tensor in draws(3))
    timesteps = theirs.timesteps[[0, 400, 999]]
    expected = theirs.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(ours.add_noise(latents, noise, timesteps), expected)
    torch.testing.assert_close(ours.target(latents, noise, timesteps), noise - latents)


def test_edm_is_preconditioned_as_karras() -> None:
    """Table 1 of Karras et al. 2022 with σ_data = 1, written down again, against ours."""
    ours = Diffusion(DiffusionConfig(schedule=NoiseSchedule.edm, loss_weight=LossWeight.edm))
    latents, noise = draws(5)
    timesteps = ours.schedule.draw(torch.linspace(0.01, 0.99, 5, dtype=torch.float64)).double()
    sigma = (4.0 * timesteps).exp().view(-1, 1, 1, 1)  # c_noise is log(σ) / 4
    c_skip, c_out = 1.0 / (sigma**2 + 1.0), sigma / (sigma**2 + 1.0).sqrt()
    c_in = 1.0 / (sigma**2 + 1.0).sqrt()
    noisy = latents + sigma * noise
    torch.testing.assert_close(ours.add_noise(latents, noise, timesteps), c_in * noisy)
    effective_target = (latents - c_skip * noisy) / c_out
    torch.testing.assert_close(ours.target(latents, noise, timesteps), -effective_target)
    loss_weight = (sigma**2 + 1.0) / sigma**2 * c_out**2
    expected = loss_weight.flatten().float()
    torch.testing.assert_close(ours.loss_weight(timesteps), expected)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(PredictionType),
    st.sampled_from(NoiseSchedule),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_the_true_output_is_read_as_the_true_latents_and_noise(
    prediction: PredictionType, schedule: NoiseSchedule, uniform: float
) -> None:
    if prediction is PredictionType.epsilon and schedule is NoiseSchedule.flow:
        schedule = NoiseSchedule.edm
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction, schedule=schedule))
    timestep = diffusion.schedule.draw(torch.tensor([uniform], dtype=torch.float64))
    latents, noise = draws(1)
    noisy = diffusion.add_noise(latents, noise, timestep)
    output = diffusion.target(latents, noise, timestep)
    level = level_of(diffusion, timestep)
    denoised, epsilon = diffusion.to_denoised_and_noise(output, noisy, level)
    # Dividing by a small signal or noise magnifies rounding, of fp32 timesteps too.
    small = min(level.signal, level.noise)
    torch.testing.assert_close(denoised, latents, rtol=0, atol=1e-6 + 1e-13 / small)
    torch.testing.assert_close(epsilon, noise, rtol=0, atol=1e-6 + 1e-13 / small)


@pytest.mark.parametrize("prediction", NOT_EPSILON)
@pytest.mark.parametrize("schedule", [NoiseSchedule.scaled_linear, NoiseSchedule.flow])
def test_outputs_are_read_at_pure_noise(
    prediction: PredictionType, schedule: NoiseSchedule
) -> None:
    discrete = schedule is not NoiseSchedule.flow
    config = DiffusionConfig(
        schedule=schedule, prediction_type=prediction, zero_terminal_snr=discrete
    )
    diffusion = Diffusion(config)
    timestep = torch.tensor([999]) if discrete else torch.tensor([1000.0], dtype=torch.float64)
    latents, noise = draws(1)
    assert torch.equal(diffusion.add_noise(latents, noise, timestep), noise)
    output = diffusion.target(latents, noise, timestep)
    level = level_of(diffusion, timestep)
    denoised, epsilon = diffusion.to_denoised_and_noise(output, noise, level)
    torch.testing.assert_close(denoised, latents)
    torch.testing.assert_close(epsilon, noise)
    assert diffusion.loss_weight(timestep).isfinite().all()


@pytest.mark.parametrize("prediction", PredictionType)
@pytest.mark.parametrize("schedule", [NoiseSchedule.scaled_linear, NoiseSchedule.flow])
@pytest.mark.parametrize("weight", [LossWeight.min_snr, LossWeight.edm])
def test_loss_weights_weigh_the_error_of_the_latents(
    prediction: PredictionType, schedule: NoiseSchedule, weight: LossWeight
) -> None:
    """Whatever the prediction type, weight · ‖output error‖² is w(SNR) · ‖x₀ error‖²."""
    if prediction is PredictionType.epsilon and schedule is NoiseSchedule.flow:
        schedule = NoiseSchedule.edm
    config = DiffusionConfig(
        schedule=schedule, prediction_type=prediction, loss_weight=weight, min_snr_gamma=2.0
    )
    diffusion = Diffusion(config)
    timesteps = diffusion.schedule.draw(torch.linspace(0.01, 0.95, 6, dtype=torch.float64))
    latents, noise = draws(1)
    weights = diffusion.loss_weight(timesteps)
    assert weights.shape == timesteps.shape
    assert weights.dtype == torch.float32
    for timestep, found in zip(timesteps.split(1), weights.tolist(), strict=True):
        level = level_of(diffusion, timestep)
        noisy = diffusion.add_noise(latents, noise, timestep)
        output = diffusion.target(latents, noise, timestep)
        wrong = output + 0.1 * torch.cos(latents)
        right_latents, _ = diffusion.to_denoised_and_noise(output, noisy, level)
        wrong_latents, _ = diffusion.to_denoised_and_noise(wrong, noisy, level)
        snr = (level.signal / level.noise) ** 2
        expected = min(snr, 2.0) if weight is LossWeight.min_snr else 1.0 + snr
        latent_error = (wrong_latents - right_latents).square().sum().item()
        output_error = (wrong - output).square().sum().item()
        assert found * output_error == pytest.approx(expected * latent_error, rel=1e-5)


@pytest.mark.parametrize("schedule", NoiseSchedule)
def test_the_uniform_weight_is_one(schedule: NoiseSchedule) -> None:
    diffusion = Diffusion(DiffusionConfig(schedule=schedule))
    timesteps = diffusion.schedule.draw(torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64))
    assert diffusion.loss_weight(timesteps).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("loss", "theirs"), [(DiffusionLoss.l1, F.l1_loss), (DiffusionLoss.l2, F.mse_loss)]
)
def test_errors_are_those_of_torch(loss: DiffusionLoss, theirs: Callable[..., Tensor]) -> None:
    diffusion = Diffusion(DiffusionConfig(loss=loss))
    output, target = draws(3)
    expected = theirs(output, target, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(diffusion.errors(output, target), expected)
    coarse = diffusion.errors(output.bfloat16(), target.float())
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, expected.float(), rtol=1e-2, atol=0)


EDM = DiffusionConfig(schedule=NoiseSchedule.edm)
FLOW = DiffusionConfig(schedule=NoiseSchedule.flow)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            DiffusionConfig(zero_terminal_snr=True),
            {"prediction_type": PredictionType.epsilon},
            r"diffusion.zero_terminal_snr.*diffusion.prediction_type=epsilon.*v_prediction",
        ),
        (FLOW, {"prediction_type": PredictionType.epsilon}, r"diffusion.schedule=flow.*epsilon"),
        (FLOW, {"zero_terminal_snr": True}, r"diffusion.zero_terminal_snr.*schedule=flow"),
        (EDM, {"zero_terminal_snr": True}, r"diffusion.zero_terminal_snr.*schedule=edm"),
        (EDM, {"sigma_min": 0.0}, "sigma_min"),
        (EDM, {"sigma_max": 0.001}, "sigma_max"),
        (EDM, {"log_sigma_std": 0.0}, "diffusion.log_sigma_std=0.0 must be a number > 0"),
        (FLOW, {"flow_shift": -1.0}, "diffusion.flow_shift=-1.0 must be a number > 0"),
        (DiffusionConfig(), {"min_snr_gamma": 0.0}, "diffusion.min_snr_gamma=0.0"),
        (DiffusionConfig(), {"offset_noise": -0.1}, "diffusion.offset_noise=-0.1"),
        (DiffusionConfig(), {"beta_end": 1.0}, "diffusion.beta_end=1.0 must be"),
        (DiffusionConfig(), {"num_timesteps": 0}, "diffusion.num_timesteps=0"),
        (
            DiffusionConfig(loss=DiffusionLoss.l1),
            {"loss_weight": LossWeight.min_snr},
            r"diffusion\.loss_weight=min_snr .* take uniform, or diffusion\.loss=l2",
        ),
    ],
)
def test_contradictions_are_named(
    config: DiffusionConfig, options: dict[str, Any], message: str
) -> None:
    Diffusion(config)
    with pytest.raises(ValueError, match=message):
        Diffusion(dataclasses.replace(config, **options))
