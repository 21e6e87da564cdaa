import pytest
import torch
from torch import Tensor

from models.attention import Context
from models.config import SamplerConfig
from models.guidance import guided
from models.schedules import Level
from tests.unit.models.oracles import diffusers

NOISE = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
CONTEXT, NULL = Context(torch.randn(3, 2, 8)), Context(torch.randn(3, 2, 8))
MASKED = Context(CONTEXT.tokens, torch.tensor([[True, False], [True, True], [False, True]]))
MASKED_NULL = Context(NULL.tokens, torch.tensor([[True, False]] * 3))
LEVEL = Level(timestep=7, signal=0.8, noise=0.6)


class Recorder:
    """A denoiser whose output tells its inputs apart, and which counts its samples."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, latents: Tensor, timesteps: Tensor, context: Context | None) -> Tensor:
        assert timesteps.dtype == torch.int64
        assert timesteps.shape == latents.shape[:1]
        self.samples += len(latents)
        shift = torch.zeros(len(latents))
        if context is not None:
            mask = 1.0 if context.mask is None else context.mask[:, :, None]
            shift = (mask * context.tokens).sum(dim=(1, 2))
        return torch.sin(latents * timesteps[:, None, None, None] + shift[:, None, None, None])


def conditional_and_null(context: Context = CONTEXT, null: Context = NULL) -> tuple[Tensor, Tensor]:
    timesteps = torch.full((3,), 7)
    unet = Recorder()
    return unet(NOISE, timesteps, context), unet(NOISE, timesteps, null)


@pytest.mark.parametrize(("context", "null"), [(CONTEXT, NULL), (MASKED, MASKED_NULL)])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 7.5])
def test_guidance_extrapolates_from_null_in_one_batch(scale, context, null):
    unet = Recorder()
    output = guided(unet, context, null, SamplerConfig(guidance_scale=scale))(NOISE, LEVEL)
    assert unet.samples == 2 * len(NOISE)
    conditional, null = conditional_and_null(context, null)
    torch.testing.assert_close(output, null + scale * (conditional - null), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("context", "null", "scale"), [(CONTEXT, NULL, 1.0), (None, None, 7.5)])
def test_without_guidance_the_null_pass_is_skipped(context, null, scale):
    unet = Recorder()
    output = guided(unet, context, null, SamplerConfig(guidance_scale=scale))(NOISE, LEVEL)
    assert unet.samples == len(NOISE)
    torch.testing.assert_close(output, unet(NOISE, torch.full((3,), 7), context))


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_rescaling_is_diffusers(share):
    from_pipeline = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
    plain, rescaled = (
        guided(Recorder(), CONTEXT, NULL, SamplerConfig(guidance_rescale=value))(NOISE, LEVEL)
        for value in (0.0, share)
    )
    conditional, _ = conditional_and_null()
    expected = from_pipeline.rescale_noise_cfg(plain, conditional, guidance_rescale=share)
    torch.testing.assert_close(rescaled, expected)
    assert not torch.allclose(rescaled, plain)


@pytest.mark.parametrize(
    ("interval", "inside"),
    [([0.0, 1.0], True), ([0.3, 0.6], True), ([0.6, 0.9], False), ([0.1, 0.5], False)],
)
def test_outside_of_the_interval_the_null_pass_is_skipped(interval, inside):
    unet = Recorder()
    config = SamplerConfig(guidance_interval=interval)
    output = guided(unet, CONTEXT, NULL, config)(NOISE, LEVEL)
    conditional, _ = conditional_and_null()
    assert unet.samples == (2 if inside else 1) * len(NOISE)
    assert torch.equal(output, conditional) != inside


def test_pure_noise_is_guided_by_default():
    unet = Recorder()
    pure_noise = Level(timestep=999, signal=0.0, noise=1.0)
    guided(unet, CONTEXT, NULL, SamplerConfig())(NOISE, pure_noise)
    assert unet.samples == 2 * len(NOISE)
