"""Layers that the first stage and the U-Net share; parameter names are diffusers'."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.activations import GroupNormSiLU
from models.attention import attention


class ResBlock(nn.Module):
    """Residual block of two convolutions, shifted by a time embedding if there is one.

    Ho et al. 2020, appendix B. forward: x [B, C_in, h, w], time [B, time_dim] after its SiLU
    → [B, C_out, h, w].
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_dim: int = 0
    ) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = GroupNormSiLU(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.register_module("conv_shortcut", None)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """See the class."""
        h = self.conv1(self.norm1(x))
        if time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve the resolution by a convolution of stride 2: [B, C, h, w] → [B, C, h/2, w/2]."""

    def __init__(self, channels: int, *, pad_right_only: bool = False) -> None:
        super().__init__()
        self.pad_right_only = pad_right_only
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_right_only else 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_right_only else x)


class Upsample(nn.Module):
    """Double the resolution, nearest neighbour, then a convolution: [B, C, 2h, 2w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of x [B, N, width] to context [B, M, context_dim], or to itself.

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
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim or width, width, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim or width, width, bias=qkv_bias)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See the class. Returns [B, N, width]."""
        source = x if context is None else context
        split = (self.heads, self.head_dim)
        q = self.to_q(x).unflatten(-1, split)
        k = self.to_k(source).unflatten(-1, split)
        v = self.to_v(source).unflatten(-1, split)
        return self.to_out(attention(q, k, v).flatten(-2))


class SpatialAttention(Attention):
    """Residual self-attention between the pixels of x [B, C, h, w] (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int, heads: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See the class."""
        return x + to_grid(super().forward(to_tokens(self.group_norm(x)), context), like=x)


class MidBlock(nn.Module):
    """The lowest resolution: ResBlock, attention if given, ResBlock."""

    def __init__(self, first: ResBlock, attention: nn.Module | None, second: ResBlock) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([first, second])
        self.attentions = nn.ModuleList([] if attention is None else [attention])

    def forward(
        self, x: Tensor, time: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """x: [B, C, h, w]; time: [B, time_dim]; context: [B, M, context_dim]."""
        x = self.resnets[0](x, time)
        for attend in self.attentions:
            x = attend(x, context)
        return self.resnets[1](x, time)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] → [B, h·w, C]; free when x is stored channels-last."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_grid(tokens: Tensor, *, like: Tensor) -> Tensor:
    """[B, h·w, C] → a view [B, C, h, w], with h and w of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[-2:])
