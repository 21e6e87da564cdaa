"""Layers that the first stage and the U-Net share; parameter names are diffusers'.

A grid is [B, C, h, w]; its rows [B·h·w, C] are the pixels of all images, one below the other.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.activations import GroupNormModulateSiLU, GroupNormSiLU
from models.attention import Context, attention
from models.linear import Linear


class ResBlock(nn.Module):
    """Residual block of two convolutions, told the time if there is a time embedding.

    Ho et al. 2020, appendix B. scale_shift: the time scales and shifts the second normalisation's
    output; otherwise it shifts its input. resample: between the first normalisation and
    convolution, and on the skip path: a layer without parameters (Dhariwal and Nichol 2021).
    forward: x [B, C_in, h, w], time [B, time_dim] after its SiLU → [B, C_out, h', w'].
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
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.register_module("conv_shortcut", None)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """See the class."""
        h = self.conv1(self.resample(self.norm1(x)))
        h = self.conv2(self.norm2(h, None if time is None else self.time_emb_proj(time)))
        x = self.resample(x)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve the resolution by a convolution of stride 2: [B, C, h, w] → [B, C, h/2, w/2]."""

    def __init__(self, channels: int, *, pad_right_only: bool = False) -> None:
        super().__init__()
        self.pad_right_only = pad_right_only
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_right_only else 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """See the class. time: of use to the ResBlock that may stand in this place."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_right_only else x)


class Upsample(nn.Module):
    """Double the resolution, nearest neighbour, then a convolution: [B, C, 2h, 2w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """See the class. time: of use to the ResBlock that may stand in this place."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of the rows of B images to those of their contexts, or to themselves.

    Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(
        self, width: int, heads: int, *, context_dim: int = 0, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} attention heads do not divide {width} channels")
        self.heads = heads
        self.head_dim = width // heads
        self.to_q = Linear(width, width, bias=qkv_bias)
        self.to_k = Linear(context_dim or width, width, bias=qkv_bias)
        self.to_v = Linear(context_dim or width, width, bias=qkv_bias)
        self.to_out = nn.Sequential(Linear(width, width))

    def attend(self, x: Tensor, context: Context, batch: int) -> Tensor:
        """x: [B·N, width]; context: rows [B·M, context_dim], x itself or others → [B·N, width]."""
        split = (batch, -1, self.heads, self.head_dim)
        q, k, v = self.to_q(x), self.to_k(context.tokens), self.to_v(context.tokens)
        mixed = attention(q.view(split), k.view(split), v.view(split), context.mask)
        return self.to_out(mixed.reshape(x.shape))


class SpatialAttention(Attention):
    """Residual self-attention between the pixels of x [B, C, h, w] (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int, heads: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """See the class. context: of use to the transformer that may stand in this place."""
        rows = to_rows(self.group_norm(x))
        return x + to_grid(self.attend(rows, Context(rows), len(x)), like=x)


class MidBlock(nn.Module):
    """The lowest resolution: ResBlock, attention if given, ResBlock."""

    def __init__(self, first: ResBlock, attention: nn.Module | None, second: ResBlock) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([first, second])
        self.attentions = nn.ModuleList([] if attention is None else [attention])

    def forward(
        self, x: Tensor, time: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        """x: [B, C, h, w]; time: [B, time_dim]; context: rows [B·M, context_dim]."""
        x = self.resnets[0](x, time)
        for attend in self.attentions:
            x = attend(x, context)
        return self.resnets[1](x, time)


def to_rows(x: Tensor) -> Tensor:
    """[B, C, h, w] → [B·h·w, C]; a view when x is stored channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def to_grid(rows: Tensor, *, like: Tensor) -> Tensor:
    """[B·h·w, C] → a view [B, C, h, w], with B, h and w of `like`."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)
