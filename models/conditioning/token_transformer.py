"""The transformer over tokens that is trained with the U-Net (Rombach et al. 2022, appendix E.2.1).

It has the layers of the authors' code: pre-norm attention and feed-forward (Vaswani et al. 2017,
Xiong et al. 2020). Theirs has a projection to logits, too, which no condition needs. With it, 32
layers of 1,280 channels on 77 of 30,522 tokens have the 581,994,042 parameters of their text
model; without it, 542,895,360.
"""

import torch
from torch import Tensor, nn

from models.layers.attention import sdpa_attention
from models.layers.linear import Linear

HEADS, HEAD_DIM = 8, 64
"""Of every layer, whatever its width."""
EXPANSION = 4
"""Width of the feed-forward's inside, by that of a token."""
INITIAL_STD = 0.02
"""Standard deviation of new embeddings."""


class TokenLayer(nn.Module):
    """Self-attention, then a feed-forward network; each is normalised before and added after."""

    def __init__(self, width: int) -> None:
        """width: of a token."""
        super().__init__()
        inside = HEADS * HEAD_DIM
        self.norm1 = nn.LayerNorm(width)
        self.to_q = Linear(width, inside, bias=False)
        self.to_k = Linear(width, inside, bias=False)
        self.to_v = Linear(width, inside, bias=False)
        self.to_out = Linear(inside, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            Linear(width, EXPANSION * width), nn.GELU(), Linear(EXPANSION * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        """x: rows [B·N, width]; mask: [B, N], as `TokenTransformer` → [B·N, width]."""
        split = (batch, -1, HEADS, HEAD_DIM)
        rows = self.norm1(x)
        q, k, v = (layer(rows).view(split) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = sdpa_attention(q, k, v, mask)
        x = x + self.to_out(mixed.reshape(len(x), HEADS * HEAD_DIM))
        return x + self.feed_forward(self.norm2(x))


class TokenTransformer(nn.Module):
    """Numbers → tokens: embeddings of numbers and of places, layers, a last LayerNorm."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        """vocabulary: numbers 0 to vocabulary - 1; length: most tokens; width: of a token."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        for embedding in (self.embedding, self.places):
            nn.init.normal_(embedding.weight, std=INITIAL_STD)
        self.layers = nn.ModuleList(TokenLayer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, numbers: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode numbers [B, N] int64, N ≤ length, to tokens [B, N, width] in the weights' dtype.

        mask: [B, N] bool, false for padding, which no other token attends to; at least one token of
        a sample is true. None: no padding.
        """
        batch, count = numbers.shape
        places = self.places(torch.arange(count, device=numbers.device))
        x = (self.embedding(numbers) + places).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, mask, batch)
        return self.norm(x).view(batch, count, -1)
