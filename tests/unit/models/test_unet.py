from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.attention import AttentionShape
from models.blocks import SpatialAttention
from models.config import UNetConfig
from models.unet import TimeEmbedding, UNet2DCondition, attention_shapes
from tests.unit.models.oracles import (
    assert_same_outputs_and_gradients,
    diffusers,
    load_both_ways,
)

TIMESTEPS = torch.tensor([3, 977])
SHIPPED = Path(__file__).parents[3] / "conf" / "unet"


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
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
    )


def diffusers_unconditional(config: UNetConfig, head_dim: int) -> Any:
    """Without cross-attention; a class is added to the time."""
    resample = "resnet" if config.resblock_updown else "conv"
    down, up = "DownBlock2D", "UpBlock2D"
    if config.resblock_updown:
        down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    return diffusers.UNet2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=["AttnDownBlock2D" if attends else down for attends in config.attention],
        up_block_types=["AttnUpBlock2D" if attends else up for attends in config.attention[::-1]],
        downsample_type=resample,
        upsample_type=resample,
        layers_per_block=config.layers_per_block,
        attention_head_dim=head_dim,
        flip_sin_to_cos=True,
        freq_shift=0,
        norm_num_groups=config.norm_groups,
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
        attn_norm_num_groups=config.norm_groups,
        class_embed_type="identity" if config.add_context else None,
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
        pytest.param({"scale_shift_norm": True}, id="scale-shift norm"),
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


MASK = torch.tensor([[True, True, True, True, False], [True, False, False, False, False]])


def test_a_masked_context_is_diffusers():
    config = small()
    ours, theirs = UNet2DCondition(config), diffusers_condition(config)
    load_both_ways(ours, theirs)
    torch.manual_seed(0)
    assert_same_outputs_and_gradients(
        ours,
        theirs,
        lambda x, t, c: ours(x, t, c, MASK),
        lambda x, t, c: theirs(x, t, c, encoder_attention_mask=MASK).sample,
        torch.randn(2, 4, 8, 16),
        TIMESTEPS,
        torch.randn(2, 5, 24),
    )


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_padding_under_the_mask_changes_nothing(gradient_checkpointing):
    torch.manual_seed(0)
    unet = UNet2DCondition(small(gradient_checkpointing=gradient_checkpointing))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    context[~MASK] = 1e4
    padded = unet(latents, TIMESTEPS, context.requires_grad_(), MASK)
    for sample, count in enumerate(MASK.sum(1).tolist()):
        one = slice(sample, sample + 1)
        cut = unet(latents[one], TIMESTEPS[one], context[one, :count])
        torch.testing.assert_close(padded[one], cut, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(padded.sum(), context)
    assert (gradient.abs().amax(-1) > 0).equal(MASK)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="faces"),
        pytest.param(
            {"scale_shift_norm": True, "resblock_updown": True},
            id="churches: scale-shift norm, ResBlocks change the resolution",
        ),
        pytest.param(
            {"in_channels": 7, "resblock_updown": True}, id="inpainting: concatenated condition"
        ),
        pytest.param(
            {"attention": [False, False, False], "in_channels": 6},
            id="semantic synthesis: attention in the middle only",
        ),
    ],
)
def test_unconditional_unet_is_diffusers(options):
    defaults = {"attention": [False, True, True], "context_dim": 0, "in_channels": 3}
    config = small(**(defaults | {"out_channels": 3} | options))
    ours, theirs = UNet2DCondition(config), diffusers_unconditional(config, head_dim=8)
    load_both_ways(ours, theirs)
    torch.manual_seed(0)
    assert_same_outputs_and_gradients(
        ours,
        theirs,
        lambda x, t: ours(x, t),
        lambda x, t: theirs(x, t).sample,
        torch.randn(2, config.in_channels, 8, 8),
        TIMESTEPS,
    )


def test_a_class_added_to_the_time_is_diffusers():
    config = small(attention=[False, True, True], add_context=True, context_dim=64)
    ours, theirs = UNet2DCondition(config), diffusers_unconditional(config, head_dim=8)
    load_both_ways(ours, theirs)
    torch.manual_seed(0)
    assert_same_outputs_and_gradients(
        ours,
        theirs,
        lambda x, t, c: ours(x, t, c[:, None]),
        lambda x, t, c: theirs(x, t, c).sample,
        torch.randn(2, 4, 8, 8),
        TIMESTEPS,
        torch.randn(2, 64),
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


def shipped(name: str) -> UNetConfig:
    return UNetConfig(**yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("sd1", 859_520_964, 686),
        ("sd2", 865_910_724, 686),
        ("text_1b", 872_300_484, 686),
        ("ldm4_class", 400_920_579, 688),
        ("ldm8_class", 394_984_196, 626),
        ("ldm4_unconditional", 274_056_163, 368),
        ("ldm8_churches", 294_966_916, 520),
        ("layout", 246_277_379, 1_328),
        ("semantic", 215_229_315, 216),
        ("inpainting", 387_245_827, 416),
        ("superresolution", 113_622_563, 306),
    ],
)
def test_shipped_unets_have_the_published_counts(name, parameters, tensors):
    with torch.device("meta"):
        unet = UNet2DCondition(shipped(name))
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    # The originals keep q, k and v of plain attention in one weight and one bias.
    apart = sum(4 for layer in unet.modules() if isinstance(layer, SpatialAttention))
    assert len(list(unet.parameters())) - apart == tensors


@pytest.mark.parametrize("name", ["sd1", "sd2", "layout"])
def test_shipped_conditional_unets_have_diffusers_names_and_shapes(name):
    config = shipped(name)
    with torch.device("meta"):
        ours, theirs = UNet2DCondition(config), diffusers_condition(config)
    shapes = [
        {name: value.shape for name, value in network.state_dict().items()}
        for network in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_attention_shapes_are_those_that_the_unet_computes(monkeypatch):
    seen = set()

    def spy(q, k, v, mask):
        seen.add(AttentionShape._make((*q.shape[:2], k.shape[1], *q.shape[2:], mask is not None)))
        return q

    monkeypatch.setattr("models.blocks.attention", spy)
    for options in ({}, {"context_dim": 0}, {"add_context": True, "context_dim": 64}):
        config = small(attention=[True, False, False], heads=[4, 4, 6], **options)
        context = torch.randn(2, 1, config.context_dim) if config.context_dim else None
        for mask in (None, torch.ones(2, 1, dtype=torch.bool)) if context is not None else (None,):
            seen.clear()
            UNet2DCondition(config)(torch.randn(2, 4, 8, 8), TIMESTEPS, context, mask)
            masked = mask is not None
            assert attention_shapes(config, 2, 8, 1, masked=masked) == sorted(seen)


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
        (
            {"context_dim": 64, "add_context": True},
            (8, 8),
            torch.zeros(2, 5, 64),
            "unet.add_context adds one token to the time embedding, but the conditioner gives 5",
        ),
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
        ({"add_context": True}, "set unet.context_dim = conditioner.width = 64, not 24"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNet2DCondition(small(**options))


def test_heads_of_a_level_without_attention_do_not_matter():
    UNet2DCondition(small(attention=[False, True, False], heads=[5, 4, 6]))
