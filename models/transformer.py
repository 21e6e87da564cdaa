"""Cross-attention transformer of the U-Net (Rombach et al. 2022, section 3.3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.activations import geglu
from models.blocks import Attention, to_grid, to_tokens


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate (Shazeer 2020, equation 6): [..., in] → [..., out]."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """Two layers, four times as wide between them: [B, N, width] → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The identity keeps the last layer's name, net.2, where others have a dropout.
        self.net = nn.Sequential(
            GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return self.net(tokens)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each residual, normalised before.

    forward: tokens [B, N, width], context [B, M, context_dim] → [B, N, width].
    """

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """See the class."""
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return tokens + self.ff(self.norm3(tokens))


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, its weight stored as one, of pixels given as tokens [B, N, C]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return F.linear(input, self.weight.flatten(1), self.bias)


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
        projection = nn.Linear if linear_projection else PointwiseConv
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim) for _ in range(depth)
        )
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: [B, C, h, w]; context: [B, M, context_dim] → [B, C, h, w]."""
        tokens = self.proj_in(to_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + to_grid(self.proj_out(tokens), like=x)
