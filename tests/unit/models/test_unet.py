from typing import Any

import pytest
import torch

from models.config import UNetConfig
from models.unet import TimeEmbedding, UNet2DCondition, attention_head_dims
from tests.unit.models.oracles import (
    assert_same_outputs_and_gradients,
    diffusers,
    load_both_ways,
)

TIMESTEPS = torch.tensor([3, 977])


def small(**options) -> UNetConfig:
    defaults = {
        "block_out_channels": [16, 32, 48],
        "attention": [True, True, False],
        "heads": [2, 4, 6],
        "context_dim": 24,
        "norm_groups": 8,
    }
    return UNetConfig(**(defaults | options))


def diffusers_condition(config: UNetConfig) -> Any:
    names = ["CrossAttn" if attends else "" for attends in config.attention]
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=[f"{name}DownBlock2D" for name in names],
        up_block_types=[f"{name}UpBlock2D" for name in reversed(names)],
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.heads,
        transformer_layers_per_block=config.transformer_depth,
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
    )


def diffusers_unconditional(config: UNetConfig, head_dim: int) -> Any:
    names = ["Attn" if attends else "" for attends in config.attention]
    return diffusers.UNet2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=[f"{name}DownBlock2D" for name in names],
        up_block_types=[f"{name}UpBlock2D" for name in reversed(names)],
        layers_per_block=config.layers_per_block,
        attention_head_dim=head_dim,
        flip_sin_to_cos=True,
        freq_shift=0,
        norm_num_groups=config.norm_groups,
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="SD 1: convolutional projections"),
        pytest.param({"linear_projection": True}, id="SD 2: linear projections"),
        pytest.param(
            {"attention": [False, True, True], "transformer_depth": 2, "in_channels": 6},
            id="LDM layout: depth 2, attention below the top",
        ),
        pytest.param(
            {
                "block_out_channels": [16, 32],
                "attention": [False, True],
                "heads": [2, 2],
                "layers_per_block": 1,
            },
            id="tiny",
        ),
    ],
)
def test_conditional_unet_is_diffusers(options):
    config = small(**options)
    ours, theirs = UNet2DCondition(config), diffusers_condition(config)
    load_both_ways(ours, theirs)
    torch.manual_seed(0)
    latents, context = torch.randn(2, config.in_channels, 8, 16), torch.randn(2, 5, 24)
    assert_same_outputs_and_gradients(
        ours,
        theirs,
        lambda x, t, c: ours(x, t, c),
        lambda x, t, c: theirs(x, t, c).sample,
        latents,
        TIMESTEPS,
        context,
    )


def test_unconditional_unet_is_diffusers():
    config = small(attention=[False, True, True], context_dim=0, in_channels=3, out_channels=3)
    ours, theirs = UNet2DCondition(config), diffusers_unconditional(config, head_dim=8)
    load_both_ways(ours, theirs)
    torch.manual_seed(0)
    assert_same_outputs_and_gradients(
        ours,
        theirs,
        lambda x, t: ours(x, t),
        lambda x, t: theirs(x, t).sample,
        torch.randn(2, 3, 8, 8),
        TIMESTEPS,
    )


@pytest.mark.parametrize(
    "variant", ["gradient_checkpointing", "channels_last", "both"], ids=lambda name: name
)
def test_variants_compute_the_same(variant):
    plain = UNet2DCondition(small())
    other = UNet2DCondition(small(gradient_checkpointing=variant != "channels_last"))
    load_both_ways(other, plain)
    memory_format = torch.contiguous_format
    if variant != "gradient_checkpointing":
        memory_format = torch.channels_last
        other.to(memory_format=memory_format)
    torch.manual_seed(0)
    assert_same_outputs_and_gradients(
        other,
        plain,
        lambda x, t, c: other(x.contiguous(memory_format=memory_format), t, c),
        lambda x, t, c: plain(x, t, c),
        torch.randn(2, 4, 8, 8),
        TIMESTEPS,
        torch.randn(2, 5, 24),
    )


def test_gradient_checkpointing_stores_less():
    stored = {}
    for checkpointing in (False, True):
        unet = UNet2DCondition(small(gradient_checkpointing=checkpointing))
        sizes = stored.setdefault(checkpointing, {})

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = unet(torch.randn(2, 4, 16, 16), TIMESTEPS, torch.randn(2, 5, 24))
        assert output.requires_grad
    assert sum(stored[True].values()) < 0.5 * sum(stored[False].values())


LEVELS_BELOW_TOP = [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        pytest.param({"context_dim": 768}, 859_520_964, id="SD 1"),
        pytest.param({"context_dim": 1280}, 872_300_484, id="LDM text 1.45B"),
        pytest.param(
            {
                "in_channels": 3,
                "out_channels": 3,
                "block_out_channels": [192, 384, 576, 960],
                "attention": LEVELS_BELOW_TOP,
                "heads": [1, 1, 1, 1],
                "context_dim": 512,
            },
            400_920_579,
            id="LDM-4 ImageNet",
        ),
        pytest.param(
            {
                "block_out_channels": [256, 512, 1024],
                "attention": [True, True, True],
                "heads": [8, 16, 32],
                "context_dim": 512,
            },
            394_984_196,
            id="LDM-8 ImageNet",
        ),
        pytest.param(
            {
                "in_channels": 3,
                "out_channels": 3,
                "block_out_channels": [128, 256, 384, 512],
                "attention": LEVELS_BELOW_TOP,
                "heads": [4, 8, 12, 16],
                "transformer_depth": 3,
                "context_dim": 512,
            },
            246_277_379,
            id="LDM-4 layout",
        ),
        pytest.param(
            {
                "in_channels": 3,
                "out_channels": 3,
                "block_out_channels": [224, 448, 672, 896],
                "attention": LEVELS_BELOW_TOP,
                "heads": [7, 14, 21, 28],
                "context_dim": 0,
            },
            274_056_163,
            id="LDM-4 unconditional",
        ),
    ],
)
def test_parameter_counts_of_published_models(options, parameters):
    with torch.device("meta"):
        unet = UNet2DCondition(UNetConfig(**options))
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters


def test_sd2_has_diffusers_names_and_shapes():
    config = UNetConfig(context_dim=1024, heads=[5, 10, 20, 20], linear_projection=True)
    with torch.device("meta"):
        ours, theirs = UNet2DCondition(config), diffusers_condition(config)
    shapes = [
        {name: value.shape for name, value in network.state_dict().items()}
        for network in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert attention_head_dims(config) == [64]


def test_head_dims_are_those_of_attending_levels_and_the_middle():
    assert attention_head_dims(small(attention=[True, False, False], heads=[4, 4, 6])) == [4, 8]


def test_an_untrained_unet_predicts_zero():
    output = UNet2DCondition(small())(torch.randn(2, 4, 8, 8), TIMESTEPS, torch.randn(2, 5, 24))
    assert output.abs().max() == 0.0


def test_bf16_does_not_blur_the_timesteps():
    timesteps = torch.arange(900, 1000)
    embed = TimeEmbedding(64, 64).bfloat16()
    narrow = embed(timesteps)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), embed.float()(timesteps), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    ("options", "shape", "context", "message"),
    [
        ({}, (6, 8), torch.zeros(2, 5, 24), "multiple of 4"),
        ({}, (8, 8), None, "unet.context_dim = 24, but the conditioner gives no context"),
        ({"context_dim": 0}, (8, 8), torch.zeros(2, 5, 24), "unet.context_dim = 0"),
    ],
)
def test_wrong_inputs_are_named(options, shape, context, message):
    unet = UNet2DCondition(small(**options))
    with pytest.raises(ValueError, match=message):
        unet(torch.zeros(2, 4, *shape), TIMESTEPS, context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": [2, 4]}, "unet.heads has 2 entries, but unet.block_out_channels has 3"),
        ({"attention": [True]}, "unet.attention has 1 entries"),
        ({"norm_groups": 5}, "unet.norm_groups = 5 does not divide the 16"),
        ({"heads": [2, 5, 6]}, r"unet.heads\[1\] = 5 does not divide the 32"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNet2DCondition(small(**options))


def test_heads_of_a_level_without_attention_do_not_matter():
    UNet2DCondition(small(attention=[False, True, False], heads=[5, 4, 6]))
