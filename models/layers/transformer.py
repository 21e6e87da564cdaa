"""Cross-attention transformer of the U-Net (Rombach et al. 2022, section 3.3)."""

from collections import OrderedDict

from torch import Tensor, nn

from models.layers.activations import GEGLULinear
from models.layers.blocks import Attention, to_grid, to_rows
from models.layers.group_norm import GroupNorm
from models.layers.linear import Linear, PointwiseConv


class FeedForward(nn.Sequential):
    """A GEGLU layer of four times the width, and a linear layer (Shazeer 2020, equation 6).

    [rows, width] → [rows, width]. The names of the weights are diffusers'.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(OrderedDict(proj=Linear(width, 8 * width))),
            nn.Identity(),  # in the place of diffusers' dropout
            GEGLULinear(4 * width, width),
        )


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward: each residual, after a layer norm."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, rows: Tensor, tokens: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        """rows: [B·N, width]; tokens: rows [B·M, context_dim]; mask: [B, M] → [B·N, width]."""
        normed = self.norm1(rows)
        rows = rows + self.attn1.attend(normed, normed, None, batch)
        rows = rows + self.attn2.attend(self.norm2(rows), tokens, mask, batch)
        return rows + self.ff(self.norm3(rows))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of x, residual.

    linear_projection: project in and out by linear layers (SD 2), not 1x1 convolutions (SD 1). The
    results are equal; the weights have another shape.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        depth: int,
        context_dim: int,
        groups: int,
        linear_projection: bool,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = _projection(channels, linear=linear_projection)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim) for _ in range(depth)
        )
        self.proj_out = _projection(channels, linear=linear_projection)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [B, C, h, w]; tokens: rows [B·M, context_dim]; mask: [B, M] → [B, C, h, w]."""
        rows = self.proj_in(to_rows(self.norm(x)))
        for block in self.transformer_blocks:
            rows = block(rows, tokens, mask, len(x))
        return x + to_grid(self.proj_out(rows), like=x)


def _projection(channels: int, *, linear: bool) -> nn.Module:
    return Linear(channels, channels) if linear else PointwiseConv(channels, channels, 1)
