"""Layers that the first stage and the U-Net share; parameter names are diffusers'.

A grid is [B, C, h, w]; its rows [B·h·w, C] are the pixels of all samples, in their order.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import Backend, sdpa_attention
from models.layers.group_norm import GroupNorm, GroupNormModulateSiLU, GroupNormSiLU
from models.layers.linear import Linear


class ResBlock(nn.Module):
    """A residual block of two convolutions, with or without a time embedding.

    Ho et al. 2020, appendix B. time_dim: width of the time embedding; 0: none. scale_shift: the
    embedding scales and shifts the output of the second normalisation; otherwise it shifts its
    input. resample: a layer without parameters, before the first convolution and on the skip path
    (Dhariwal and Nichol 2021, section 3).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_dim: int = 0,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        second_norm = GroupNormModulateSiLU if scale_shift else GroupNormSiLU
        self.norm1 = GroupNormSiLU(groups, in_channels, eps)
        self.resample = resample or nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim:
            self.time_emb_proj = Linear(time_dim, (2 if scale_shift else 1) * out_channels)
        self.norm2 = second_norm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: [B, C_in, h, w]; time: [B, time_dim] after SiLU → [B, C_out, h', w']."""
        h = self.conv1(self.resample(self.norm1(x)))
        h = self.conv2(self.norm2(h, None if time is None else self.time_emb_proj(time)))
        x = self.resample(x)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2.

    pad_right_only: pad on the right and at the bottom, as in the code of LDM's first stage.
    """

    def __init__(self, channels: int, *, pad_right_only: bool = False) -> None:
        super().__init__()
        self.pad_right_only = pad_right_only
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_right_only else 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: [B, C, h, w] → [B, C, h/2, w/2]; time is for a ResBlock in this place."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_right_only else x)


class Upsample(nn.Module):
    """Upsampling to double resolution by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: [B, C, h, w] → [B, C, 2h, 2w]; time is for a ResBlock in this place."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), by SDPA or another backend.

    context_dim: width of the tokens; 0: self-attention. `use_attention` changes the backend.
    """

    def __init__(
        self, width: int, heads: int, *, context_dim: int = 0, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} attention heads do not divide {width} channels")
        self.heads = heads
        self.head_dim = width // heads
        self.backend: Backend = sdpa_attention
        self.to_q = Linear(width, width, bias=qkv_bias)
        self.to_k = Linear(context_dim or width, width, bias=qkv_bias)
        self.to_v = Linear(context_dim or width, width, bias=qkv_bias)
        self.to_out = nn.Sequential(Linear(width, width))

    def attend(self, x: Tensor, tokens: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        """x: [B·N, width]; tokens: [B·M, context_dim], or x; mask: [B, M] → [B·N, width]."""
        split = (batch, -1, self.heads, self.head_dim)
        q, k, v = self.to_q(x), self.to_k(tokens), self.to_v(tokens)
        mixed = self.backend(q.view(split), k.view(split), v.view(split), mask)
        return self.to_out(mixed.reshape(x.shape))


class SpatialAttention(Attention):
    """Residual self-attention between pixels (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int, heads: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads, qkv_bias=True)
        self.group_norm = GroupNorm(groups, channels, eps)

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x: [B, C, h, w] → [B, C, h, w]; tokens and mask are for SpatialTransformer alone."""
        rows = to_rows(self.group_norm(x))
        return x + to_grid(self.attend(rows, rows, None, len(x)), like=x)


class MidBlock(nn.Module):
    """The lowest resolution: a ResBlock, attention or none, a ResBlock."""

    def __init__(self, first: ResBlock, attention: nn.Module | None, second: ResBlock) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([first, second])
        self.attentions = nn.ModuleList([] if attention is None else [attention])

    def forward(
        self,
        x: Tensor,
        time: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x: [B, C, h, w] → [B, C, h, w].

        time: [B, time_dim]; tokens: rows [B·M, context_dim]; mask: [B, M].
        """
        x = self.resnets[0](x, time)
        for attend in self.attentions:
            x = attend(x, tokens, mask)
        return self.resnets[1](x, time)


def use_attention(network: nn.Module, backend: Backend) -> None:
    """Set the backend of every attention within a network."""
    for layer in network.modules():
        if isinstance(layer, Attention):
            layer.backend = backend


def to_rows(x: Tensor) -> Tensor:
    """Reshape [B, C, h, w] → [B·h·w, C]: a view if x is stored channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def to_grid(rows: Tensor, *, like: Tensor) -> Tensor:
    """View rows [B·h·w, C] → [B, C, h, w], with B, h and w of `like`."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)
