"""diffusers' networks as oracles for ours: the same weights must give the same numbers."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.config import AutoencoderConfig, AutoencoderKind, UNetConfig

# Any: its lazy exports and its annotations mislead a type checker.
diffusers: Any = importlib.import_module("diffusers")


def load_both_ways(ours: nn.Module, theirs: nn.Module) -> None:
    """Give both the same random weights, norms and biases too, through strict state dicts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def assert_same_outputs_and_gradients(
    ours: nn.Module,
    theirs: nn.Module,
    run_ours: Callable[..., Tensor],
    run_theirs: Callable[..., Any],
    *inputs: Tensor,
) -> None:
    """Outputs, and gradients of every parameter and float input, to 1e-5 of their size.

    In fp64: in fp32 the sums of some random weights round by more than that.
    """
    results = []
    for network, run in ((ours, run_ours), (theirs, run_theirs)):
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in wide]
        network.double().zero_grad()
        output = run(*leaves)
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        (output * probe).sum().backward()
        gradients = {name: value.grad for name, value in network.named_parameters()}
        gradients |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
        results.append((output, {k: v for k, v in gradients.items() if v is not None}))
    (output, gradients), (expected, expected_gradients) = results
    _assert_close("output", output, expected, expected.abs().max())
    assert gradients.keys() == expected_gradients.keys()
    largest = torch.stack([value.abs().max() for value in expected_gradients.values()]).max()
    for name, expected_gradient in expected_gradients.items():
        # Sums of many large terms that cancel are not exact to their own size.
        scale = expected_gradient.abs().max().clamp(min=0.02 * largest)
        _assert_close(name, gradients[name], expected_gradient, scale)


def _assert_close(name: str, ours: Tensor, expected: Tensor, scale: Tensor) -> None:
    error = ((ours - expected).abs().max() / scale).item()
    assert error < 1e-5, f"{name} differs by {error:.1e}"


def diffusers_autoencoder(config: AutoencoderConfig) -> Any:
    """The network of diffusers that the options describe."""
    levels = range(len(config.block_out_channels))
    attends = ["Attn" if level in config.attention_levels else "" for level in levels]
    options = {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "down_block_types": [f"{attend}DownEncoderBlock2D" for attend in attends],
        "up_block_types": [f"{attend}UpDecoderBlock2D" for attend in reversed(attends)],
        "mid_block_add_attention": config.mid_attention,
    }
    if config.kind is AutoencoderKind.kl:
        return diffusers.AutoencoderKL(**options)
    network = diffusers.VQModel(**options, num_vq_embeddings=config.num_embeddings)
    # Its default keeps an old mistake: the commitment weight on the codebook's term.
    network.quantize.legacy = False
    return network


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
