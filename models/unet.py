"""The denoiser: a U-Net, with or without cross-attention to tokens (Rombach et al. 2022).

State-dict names are those of diffusers' UNet2DConditionModel, and of its UNet2DModel when there
are no tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from models.config import UNetConfig
from models.layers.attention import AttentionShape
from models.layers.blocks import Downsample, MidBlock, ResBlock, SpatialAttention, Upsample
from models.layers.group_norm import GroupNormSiLU
from models.layers.linear import Linear
from models.layers.transformer import SpatialTransformer

_checkpoint: Any = checkpoint  # torch declares only a part of its types

NORM_EPS = 1e-5
MAX_PERIOD = 10_000.0


class UNet2DCondition(nn.Module):
    """Predicts noise, x₀, v or flow from noisy latents, timesteps and tokens."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])

        self.down_blocks = nn.ModuleList()
        width, skips = widths[0], [widths[0]]
        for level, level_width in enumerate(widths):
            block = DownBlock()
            for _ in range(layers):
                block.resnets.append(_res_block(config, width, level_width))
                if config.attention[level]:
                    block.attentions.append(_attention(config, level))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                block.downsamplers.append(_downsample(config, width))
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block = MidBlock(
            _res_block(config, width, width),
            _attention(config, -1),
            _res_block(config, width, width),
        )

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            block = UpBlock()
            for _ in range(layers + 1):
                block.resnets.append(_res_block(config, width + skips.pop(), widths[level]))
                if config.attention[level]:
                    block.attentions.append(_attention(config, level))
                width = widths[level]
            if level > 0:
                block.upsamplers.append(_upsample(config, width))
            self.up_blocks.append(block)

        self.conv_norm_out = GroupNormSiLU(config.norm_groups, width, NORM_EPS)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        self._start_as_identity()

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the model output [B, out_channels, h, w].

        latents: [B, in_channels, h, w]; timesteps: [B]; tokens: [B, M, context_dim], or None if
        context_dim is 0; with add_context M is 1. mask: [B, M] bool, false for padding; None: no
        padding.

        Raises: ValueError if h or w cannot be halved between the levels, or if the config needs
        tokens and there are none, or the reverse.
        """
        self._check_inputs(latents, tokens)
        time = self.time_embedding(timesteps)
        rows = None if tokens is None else tokens.flatten(0, 1)
        if self.config.add_context and rows is not None:
            time = time + rows
        time = F.silu(time)
        recompute = self.config.gradient_checkpointing and self.training
        call = _call_recomputing if recompute else _call
        skips = [self.conv_in(latents)]
        for down_block in self.down_blocks:
            # the block cannot append to the list itself: under ZeRO stage 3 it gets a copy
            skips += down_block(skips[-1], time, rows, mask, call)
        x = call(self.mid_block, skips[-1], time, rows, mask)
        for up_block in self.up_blocks:
            own = [skips.pop() for _ in range(self.config.layers_per_block + 1)]
            x = up_block(x, time, rows, mask, own, call)
        return self.conv_out(self.conv_norm_out(x))

    def _check_inputs(self, latents: Tensor, tokens: Tensor | None) -> None:
        height, width = latents.shape[-2:]
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"latents of {height}x{width} cannot be halved between the U-Net's levels: choose "
                f"a data.image_size whose latents are a multiple of {factor}, or fewer "
                f"unet.block_out_channels"
            )
        if (tokens is None) != (self.config.context_dim == 0):
            raise ValueError(
                f"unet.context_dim = {self.config.context_dim}, but the conditioner gives "
                f"{'no ' if tokens is None else ''}tokens: set it to the conditioner's width, "
                f"0 for conditioner=none"
            )
        if self.config.add_context and tokens is not None and tokens.shape[1] != 1:
            raise ValueError(
                f"unet.add_context adds one token to the time embedding, but the conditioner gives "
                f"{tokens.shape[1]}: choose conditioner.kind=class_label, "
                f"conditioner.features=pooled, or false"
            )

    def _start_as_identity(self) -> None:
        """Zero the last layer of each residual branch and of the network, as in the code of LDM."""
        for layer in self.modules():
            if isinstance(layer, ResBlock):
                _zero(layer.conv2)
            elif isinstance(layer, SpatialTransformer):
                _zero(layer.proj_out)
            elif isinstance(layer, SpatialAttention):
                _zero(layer.to_out[0])
        _zero(self.conv_out)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then two linear layers (Vaswani et al. 2017, section 3.5).

    Cosines come first, then sines, as in the code of Dhariwal and Nichol 2021.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = Linear(width, out_width)
        self.linear_2 = Linear(out_width, out_width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps: [B] → [B, out_width]."""
        half = self.width // 2
        # Always fp32: bf16 cannot tell timestep 999 from 1000.
        exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
        frequencies = torch.exp(-math.log(MAX_PERIOD) * exponents)
        angles = timesteps[:, None].float() * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))


Call = Callable[..., Tensor]
"""(layer, its inputs) → its output; with activations stored, or recomputed in the backward pass."""


def _call(layer: nn.Module, *inputs: Tensor | None) -> Tensor:
    return layer(*inputs)


def _call_recomputing(layer: nn.Module, *inputs: Tensor | None) -> Tensor:
    # without dropout there is no random state to restore
    return _checkpoint.checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)


class Resolution(nn.Module):
    """The ResBlocks of one resolution, with attention where the resolution has it."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()


class DownBlock(Resolution):
    """One resolution on the way down: ResBlocks with attention, then a downsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.downsamplers = nn.ModuleList()

    def forward(
        self, x: Tensor, time: Tensor, tokens: Tensor | None, mask: Tensor | None, call: Call
    ) -> list[Tensor]:
        """x: [B, C, h, w] → the output of every layer; of the last one [B, C', h/2, w/2].

        time: [B, time_dim]; tokens: rows [B·M, context_dim]; mask: [B, M].
        """
        outputs: list[Tensor] = []
        for layer, resnet in enumerate(self.resnets):
            x = call(resnet, x, time)
            if self.attentions:
                x = call(self.attentions[layer], x, tokens, mask)
            outputs.append(x)
        outputs.extend(call(downsample, x, time) for downsample in self.downsamplers)
        return outputs


class UpBlock(Resolution):
    """One resolution on the way up: ResBlocks on skips, with attention, then an upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.upsamplers = nn.ModuleList()

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        tokens: Tensor | None,
        mask: Tensor | None,
        skips: list[Tensor],
        call: Call,
    ) -> Tensor:
        """x: [B, C, h, w] → [B, C', 2h, 2w].

        time: [B, time_dim]; tokens: rows [B·M, context_dim]; mask: [B, M]; skips: [B, C'', h, w],
        one for each ResBlock.
        """
        for layer, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = call(resnet, torch.cat([x, skip], dim=1), time)
            if self.attentions:
                x = call(self.attentions[layer], x, tokens, mask)
        for upsample in self.upsamplers:
            x = call(upsample, x, time)
        return x


def attention_shapes(
    config: UNetConfig, batch: int, latent_side: int, tokens: int, *, masked: bool = False
) -> list[AttentionShape]:
    """List the shapes of every attention of the U-Net, for `choose_attention`.

    batch: samples; latent_side: latent pixels; tokens: of a sample, M of `UNet2DCondition.forward`;
    masked: whether the tokens have a mask.
    """
    shapes: set[AttentionShape] = set()
    for level in _attending(config):
        heads = config.heads[level]
        pixels = (latent_side // 2**level) ** 2
        head_dim = config.block_out_channels[level] // heads
        shapes.add(AttentionShape(batch, pixels, pixels, heads, head_dim))
        if _attends_context(config):
            shapes.add(AttentionShape(batch, pixels, tokens, heads, head_dim, masked))
    return sorted(shapes)


def _attending(config: UNetConfig) -> set[int]:
    """Return the levels with attention; the middle block counts as the last level."""
    levels = range(len(config.block_out_channels))
    return {level for level in levels if config.attention[level] or level == levels[-1]}


def _attends_context(config: UNetConfig) -> bool:
    return config.context_dim > 0 and not config.add_context


def _res_block(
    config: UNetConfig, in_width: int, width: int, resample: nn.Module | None = None
) -> ResBlock:
    return ResBlock(
        in_width,
        width,
        groups=config.norm_groups,
        eps=NORM_EPS,
        time_dim=4 * config.block_out_channels[0],
        scale_shift=config.scale_shift_norm,
        resample=resample,
    )


def _downsample(config: UNetConfig, width: int) -> nn.Module:
    if config.resblock_updown:
        return _res_block(config, width, width, resample=nn.AvgPool2d(2))
    return Downsample(width)


def _upsample(config: UNetConfig, width: int) -> nn.Module:
    if config.resblock_updown:
        return _res_block(config, width, width, resample=nn.Upsample(scale_factor=2.0))
    return Upsample(width)


def _attention(config: UNetConfig, level: int) -> nn.Module:
    width, heads = config.block_out_channels[level], config.heads[level]
    if not _attends_context(config):
        return SpatialAttention(width, heads, groups=config.norm_groups, eps=NORM_EPS)
    return SpatialTransformer(
        width,
        heads,
        depth=config.transformer_depth,
        context_dim=config.context_dim,
        groups=config.norm_groups,
        linear_projection=config.linear_projection,
    )


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _check(config: UNetConfig) -> None:
    levels = len(config.block_out_channels)
    for option in ("attention", "heads"):
        if len(getattr(config, option)) != levels:
            raise ValueError(
                f"unet.{option} has {len(getattr(config, option))} entries, but "
                f"unet.block_out_channels has {levels}: give one for each level"
            )
    for level, width in enumerate(config.block_out_channels):
        if width % config.norm_groups:
            raise ValueError(
                f"unet.norm_groups = {config.norm_groups} does not divide the {width} of "
                f"unet.block_out_channels"
            )
        if level in _attending(config) and width % config.heads[level]:
            raise ValueError(
                f"unet.heads[{level}] = {config.heads[level]} does not divide the {width} of "
                f"unet.block_out_channels"
            )
    time_dim = 4 * config.block_out_channels[0]
    if config.add_context and config.context_dim != time_dim:
        raise ValueError(
            f"unet.add_context needs tokens as wide as the time embedding: set "
            f"unet.context_dim = conditioner.width = {time_dim}, not {config.context_dim}"
        )
