from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import UNetConfig
from models.layers.attention import AttentionShape
from models.layers.blocks import SpatialAttention, use_attention
from models.unet import TimeEmbedding, UNet2DCondition, attention_shapes
from tests.support.oracles import (
    assert_same_outputs_and_gradients,
    diffusers_condition,
    diffusers_unconditional,
    load_both_ways,
)
from tests.support.unet_files import described_unet

TIMESTEPS = torch.tensor([3, 977])


def small(**options: Any) -> UNetConfig:
    defaults: dict[str, Any] = {
        "block_out_channels": [16, 32, 48],
        "attention": [True, True, False],
        "heads": [2, 4, 6],
        "context_dim": 24,
        "norm_groups": 8,
    }
    return UNetConfig(**(defaults | options))


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
def test_conditional_unet_is_diffusers(options: dict[str, Any]) -> None:
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


def test_a_masked_context_is_diffusers() -> None:
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
def test_padding_under_the_mask_changes_nothing(gradient_checkpointing: bool) -> None:
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
def test_unconditional_unet_is_diffusers(options: dict[str, Any]) -> None:
    defaults = {"attention": [False, True, True], "context_dim": 0, "in_channels": 3}
    config = small(**(defaults | {"out_channels": 3} | options))
    ours, theirs = pair_without_tokens(config)
    assert_same_outputs_and_gradients(
        ours,
        theirs,
        lambda x, t: ours(x, t),
        lambda x, t: theirs(x, t).sample,
        torch.randn(2, config.in_channels, 8, 8),
        TIMESTEPS,
    )


def pair_without_tokens(config: UNetConfig) -> tuple[UNet2DCondition, torch.nn.Module]:
    """Our U-Net and diffusers', with the same weights; then the seed for what they are fed."""
    ours, theirs = UNet2DCondition(config), diffusers_unconditional(config, head_dim=8)
    load_both_ways(ours, theirs)
    torch.manual_seed(0)
    return ours, theirs


def test_a_class_added_to_the_time_is_diffusers() -> None:
    config = small(attention=[False, True, True], add_context=True, context_dim=64)
    ours, theirs = pair_without_tokens(config)
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
def test_variants_compute_the_same(variant: str) -> None:
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


def test_gradient_checkpointing_stores_less() -> None:
    stored = {}
    for checkpointing in (False, True):
        unet = UNet2DCondition(small(gradient_checkpointing=checkpointing))
        sizes = stored.setdefault(checkpointing, {})

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = unet(torch.randn(2, 4, 16, 16), TIMESTEPS, torch.randn(2, 5, 24))
        assert output.requires_grad
    assert sum(stored[True].values()) < 0.5 * sum(stored[False].values())


PUBLISHED = {
    "sd1": (859_520_964, 686),
    "sd2": (865_910_724, 686),
    "text_1b": (872_300_484, 686),
    "ldm4_class": (400_920_579, 688),
    "ldm8_class": (394_984_196, 626),
    "ldm4_unconditional": (274_056_163, 368),
    "ldm8_churches": (294_966_916, 520),
    "layout": (246_277_379, 1_328),
    "ldm4_semantic_map": (215_229_315, 216),
    "ldm4_inpainting": (387_245_827, 416),
    "ldm4_super_resolution": (113_622_563, 306),
}
"""Parameters and tensors."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_unets_of_the_paper_have_the_published_counts(name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DCondition(described_unet(name))
    # The originals keep q, k and v of plain attention in one weight and one bias.
    apart = sum(4 for layer in unet.modules() if isinstance(layer, SpatialAttention))
    parameters = list(unet.parameters())
    assert (sum(map(torch.Tensor.numel, parameters)), len(parameters) - apart) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["sd1", "sd2", "layout"])
def test_shipped_conditional_unets_have_diffusers_names_and_shapes(name: str) -> None:
    config = described_unet(name)
    with torch.device("meta"):
        ours, theirs = UNet2DCondition(config), diffusers_condition(config)
    shapes = [
        {name: value.shape for name, value in network.state_dict().items()}
        for network in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_attention_shapes_are_those_that_the_unet_computes() -> None:
    seen = set()

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen.add(AttentionShape._make((*q.shape[:2], k.shape[1], *q.shape[2:], mask is not None)))
        return q

    for options in ({}, {"context_dim": 0}, {"add_context": True, "context_dim": 64}):
        config = small(attention=[True, False, False], heads=[4, 4, 6], **options)
        context = torch.randn(2, 1, config.context_dim) if config.context_dim else None
        for mask in (None, torch.ones(2, 1, dtype=torch.bool)) if context is not None else (None,):
            seen.clear()
            unet = UNet2DCondition(config)
            use_attention(unet, spy)
            unet(torch.randn(2, 4, 8, 8), TIMESTEPS, context, mask)
            masked = mask is not None
            assert attention_shapes(config, 2, 8, 1, masked=masked) == sorted(seen)


def test_an_untrained_unet_predicts_zero() -> None:
    output = UNet2DCondition(small())(torch.randn(2, 4, 8, 8), TIMESTEPS, torch.randn(2, 5, 24))
    assert output.abs().max() == 0.0


def test_bf16_does_not_blur_the_timesteps() -> None:
    timesteps = torch.arange(900, 1000)
    embed = TimeEmbedding(64, 64).bfloat16()
    narrow = embed(timesteps)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), embed.float()(timesteps), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    ("options", "shape", "context", "message"),
    [
        ({}, (6, 8), torch.zeros(2, 5, 24), "multiple of 4"),
        ({}, (8, 8), None, "unet.context_dim = 24, but the conditioner gives no tokens"),
        ({"context_dim": 0}, (8, 8), torch.zeros(2, 5, 24), "unet.context_dim = 0"),
        (
            {"context_dim": 64, "add_context": True},
            (8, 8),
            torch.zeros(2, 5, 64),
            "unet.add_context adds one token to the time embedding, but the conditioner gives 5",
        ),
    ],
)
def test_wrong_inputs_are_named(
    options: dict[str, Any], shape: tuple[int, ...], context: Tensor | None, message: str
) -> None:
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
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet2DCondition(small(**options))


def test_heads_of_a_level_without_attention_change_nothing() -> None:
    options = {"attention": [False, True, False]}
    odd = UNet2DCondition(small(**options, heads=[5, 4, 4])).state_dict()
    even = UNet2DCondition(small(**options, heads=[4, 4, 4])).state_dict()
    assert {name: value.shape for name, value in odd.items()} == {
        name: value.shape for name, value in even.items()
    }
