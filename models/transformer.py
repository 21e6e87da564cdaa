"""Cross-attention transformer of the U-Net (Rombach et al. 2022, section 3.3)."""

from collections import OrderedDict

from torch import Tensor, nn

from models.activations import GEGLULinear
from models.attention import Context
from models.blocks import Attention, to_grid, to_rows
from models.linear import Linear, PointwiseConv


class FeedForward(nn.Sequential):
    """A gated layer, four times as wide, and one back (Shazeer 2020, equation 6): [rows, width].

    The names are those of a GEGLU layer with its projection, a dropout, and a linear layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(OrderedDict(proj=Linear(width, 8 * width))),
            nn.Identity(),
            GEGLULinear(4 * width, width),
        )


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each residual, normalised before.

    forward: rows [B·N, width], context of rows [B·M, context_dim], B → [B·N, width].
    """

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, rows: Tensor, context: Context, batch: int) -> Tensor:
        """See the class."""
        normed = self.norm1(rows)
        rows = rows + self.attn1.attend(normed, Context(normed), batch)
        rows = rows + self.attn2.attend(self.norm2(rows), context, batch)
        return rows + self.ff(self.norm3(rows))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of x [B, C, h, w], residual.

    linear_projection: project in and out by linear layers (SD 2), not 1x1 convolutions (SD 1):
    the same arithmetic, but weights of another shape.
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
        projection = Linear if linear_projection else PointwiseConv
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim) for _ in range(depth)
        )
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: [B, C, h, w]; context: rows [B·M, context_dim] → [B, C, h, w]."""
        rows = self.proj_in(to_rows(self.norm(x)))
        for block in self.transformer_blocks:
            rows = block(rows, context, len(x))
        return x + to_grid(self.proj_out(rows), like=x)
