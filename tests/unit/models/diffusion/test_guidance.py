import pytest
import torch
from torch import Tensor

from models.condition import Condition
from models.config import SamplerConfig
from models.diffusion.guidance import guided
from models.diffusion.schedules import NoiseLevel
from tests.support.oracles import diffusers

NOISE = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
CONDITION, NULL = Condition(torch.randn(3, 2, 8)), Condition(torch.randn(3, 2, 8))
MASKED = Condition(CONDITION.tokens, torch.tensor([[True, False], [True, True], [False, True]]))
PLANES, NULL_PLANES = (part._replace(planes=torch.randn(3, 1, 5, 6)) for part in (CONDITION, NULL))
MASKED_NULL = Condition(NULL.tokens, torch.tensor([[True, False]] * 3))
LEVEL = NoiseLevel(timestep=7, signal=0.8, noise=0.6)


class Recorder:
    """A denoiser whose output tells its inputs apart, and which counts its samples."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        assert timesteps.dtype == torch.int64
        assert timesteps.shape == latents.shape[:1]
        self.samples += len(latents)
        shift = torch.zeros(len(latents))
        if condition.tokens is not None:
            mask = 1.0 if condition.mask is None else condition.mask[:, :, None]
            shift = shift + (mask * condition.tokens).sum(dim=(1, 2))
        if condition.planes is not None:
            shift = shift + condition.planes.mean(dim=(1, 2, 3))
        return torch.sin(latents * timesteps[:, None, None, None] + shift[:, None, None, None])


def conditional_and_null(
    condition: Condition = CONDITION, null: Condition = NULL
) -> tuple[Tensor, Tensor]:
    timesteps = torch.full((3,), 7)
    unet = Recorder()
    return unet(NOISE, timesteps, condition), unet(NOISE, timesteps, null)


@pytest.mark.parametrize(
    ("condition", "null"), [(CONDITION, NULL), (MASKED, MASKED_NULL), (PLANES, NULL_PLANES)]
)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 7.5])
def test_guidance_extrapolates_from_null_in_one_batch(
    scale: float, condition: Condition, null: Condition
) -> None:
    unet = Recorder()
    output = guided(unet, condition, null, SamplerConfig(guidance_scale=scale))(NOISE, LEVEL)
    assert unet.samples == 2 * len(NOISE)
    conditional, without = conditional_and_null(condition, null)
    expected = without + scale * (conditional - without)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("condition", "null", "scale"), [(CONDITION, NULL, 1.0), (Condition(), Condition(), 7.5)]
)
def test_without_guidance_the_null_pass_is_skipped(
    condition: Condition, null: Condition, scale: float
) -> None:
    unet = Recorder()
    output = guided(unet, condition, null, SamplerConfig(guidance_scale=scale))(NOISE, LEVEL)
    assert unet.samples == len(NOISE)
    torch.testing.assert_close(output, unet(NOISE, torch.full((3,), 7), condition))


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_rescaling_is_diffusers(share: float) -> None:
    from_pipeline = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
    plain, rescaled = (
        guided(Recorder(), CONDITION, NULL, SamplerConfig(guidance_rescale=value))(NOISE, LEVEL)
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
def test_outside_of_the_interval_the_null_pass_is_skipped(
    interval: list[float], inside: bool
) -> None:
    unet = Recorder()
    config = SamplerConfig(guidance_interval=interval)
    output = guided(unet, CONDITION, NULL, config)(NOISE, LEVEL)
    conditional, _ = conditional_and_null()
    assert unet.samples == (2 if inside else 1) * len(NOISE)
    assert torch.equal(output, conditional) != inside


def test_pure_noise_is_guided_by_default() -> None:
    unet = Recorder()
    pure_noise = NoiseLevel(timestep=999, signal=0.0, noise=1.0)
    guided(unet, CONDITION, NULL, SamplerConfig())(NOISE, pure_noise)
    assert unet.samples == 2 * len(NOISE)


@pytest.mark.parametrize("null", [Condition(), MASKED_NULL])
def test_conditions_of_other_parts_cannot_be_guided(null: Condition) -> None:
    with pytest.raises(ValueError, match="only one of two conditions has"):
        guided(Recorder(), CONDITION, null, SamplerConfig())
