"""From a condition to the U-Net's inputs."""

import pytest
import torch

from models.condition import Condition
from models.conditioning.class_label import ClassLabel
from models.conditioning.given import Given
from models.config import ConditionerConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.unet import UNet2DCondition

LATENTS, TIMESTEPS = torch.randn(2, 4, 8, 8), torch.tensor([3, 977])
TOKENS = torch.randn(2, 5, 24)
MASK = torch.tensor([[True, True, True, False, False], [True] * 5])


def unet_of(*, in_channels: int = 4, context_dim: int = 24) -> UNet2DCondition:
    config = UNetConfig(
        in_channels=in_channels,
        block_out_channels=[16, 32],
        attention=[False, True],
        heads=[2, 4],
        context_dim=context_dim,
        norm_groups=8,
    )
    torch.manual_seed(0)
    unet = UNet2DCondition(config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_planes_are_concatenated_to_the_latents(layout: torch.memory_format, masked: bool) -> None:
    unet, planes = unet_of(in_channels=7), torch.randn(2, 3, 8, 8)
    mask = MASK if masked else None
    seen: list[torch.Tensor] = []
    unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    latents = LATENTS.contiguous(memory_format=layout)
    found = LatentDiffusion(unet, None)(latents, TIMESTEPS, Condition(TOKENS, mask, planes))
    assert seen[0].is_contiguous(memory_format=layout)
    expected = unet(torch.cat([LATENTS, planes], dim=1), TIMESTEPS, TOKENS, mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.abs().max() > 0.1
    other = LatentDiffusion(unet, None)(latents, TIMESTEPS, Condition(TOKENS, mask, -planes))
    assert not torch.allclose(found, other, atol=1e-2)


def test_planes_alone_condition_a_unet_without_tokens() -> None:
    unet, planes = unet_of(in_channels=7, context_dim=0), torch.randn(2, 3, 8, 8)
    found = LatentDiffusion(unet, None)(LATENTS, TIMESTEPS, Condition(planes=planes))
    expected = unet(torch.cat([LATENTS, planes], dim=1), TIMESTEPS)
    torch.testing.assert_close(found, expected)


def test_a_condition_comes_in_the_precision_of_the_unet() -> None:
    unet, planes = unet_of(in_channels=7), torch.randn(2, 3, 8, 8)
    expected = LatentDiffusion(unet, None)(LATENTS, TIMESTEPS, Condition(TOKENS, None, planes))
    found = LatentDiffusion(unet.bfloat16(), None)(
        LATENTS, TIMESTEPS, Condition(TOKENS, None, planes)
    )
    assert found.dtype == LATENTS.dtype
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_inputs_go_through_the_conditioner_that_is_trained() -> None:
    conditioner, unet = ClassLabel(ConditionerConfig(num_classes=3, width=24)), unet_of()
    module, given = LatentDiffusion(unet, conditioner), Given(["2", None])
    expected = module(LATENTS, TIMESTEPS, conditioner.condition(given, (8, 8)))
    inputs = conditioner.prepare(given, (8, 8))
    torch.testing.assert_close(module(LATENTS, TIMESTEPS, inputs), expected)
    with pytest.raises(ValueError, match="inputs need a conditioner"):
        LatentDiffusion(unet, None)(LATENTS, TIMESTEPS, inputs)
