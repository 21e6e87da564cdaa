"""Vector quantisation of latents (van den Oord et al. 2017), and the use of a codebook."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

COMMITMENT_WEIGHT = 0.25
CHUNK = 4096
"""Latent pixels compared with the codebook at once: 0.25 GiB of distances to 16384 codes."""


class Quantized(NamedTuple):
    """Quantised latents, the input of the decoder."""

    latents: Tensor
    """[B, C, h, w]: the nearest codes; their gradients go unchanged to the input."""
    codes: Tensor
    """[B, h, w] int64: indices of the codes."""
    loss: Tensor
    """Scalar: commitment loss and, for codes trained by gradient, codebook loss (equation 3)."""


class VectorQuantizer(nn.Module):
    """Replaces every latent pixel by its nearest code (van den Oord et al. 2017, equation 2).

    At decay 0 the codebook is a parameter, trained by gradient. Otherwise it is a buffer: each code
    is the moving average of the latents next to it (appendix A.1), updated by the latents of all
    ranks in every forward pass of the training; all ranks must run it together. A code whose
    average count is below `revival`, as every count at the start, is replaced by a latent.
    """

    counts: Tensor

    def __init__(
        self, num_embeddings: int, width: int, *, decay: float = 0.0, revival: float = 0.0
    ) -> None:
        super().__init__()
        self.decay = decay
        self.revival = revival
        self.embedding = Codebook(num_embeddings, width, trainable=decay == 0.0)
        if decay:
            self.register_buffer("counts", torch.zeros(num_embeddings))

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents [B, C, h, w]."""
        pixels = latents.movedim(1, -1)
        codes, nearest = self.embedding(pixels.flatten(0, -2))
        nearest = nearest.view(pixels.shape)
        loss = COMMITMENT_WEIGHT * F.mse_loss(pixels, nearest.detach())
        if self.decay == 0.0:
            loss = loss + F.mse_loss(nearest, pixels.detach())
        elif self.training and torch.is_grad_enabled():
            self._update(pixels.detach().flatten(0, -2), codes)
        straight_through = pixels + (nearest - pixels).detach()
        return Quantized(straight_through.movedim(-1, 1), codes.view(pixels.shape[:-1]), loss)

    @torch.no_grad()
    def _update(self, pixels: Tensor, codes: Tensor) -> None:
        """Update the averages by equations 6 to 8 of appendix A.1; m there is code · count here."""
        codebook, counts = self.embedding.weight, self.counts
        chosen = torch.zeros_like(counts).index_add_(0, codes, torch.ones_like(pixels[:, 0]))
        totals = torch.zeros_like(codebook).index_add_(0, codes, pixels)
        if dist.is_initialized():
            dist.all_reduce(chosen)
            dist.all_reduce(totals)
        counts.mul_(self.decay).add_(chosen, alpha=1 - self.decay)
        # a code without any latent so far has a count of 0, and stays
        rate = (1 - self.decay) / counts.clamp(min=torch.finfo(counts.dtype).tiny)
        codebook.add_(rate[:, None] * (totals - chosen[:, None] * codebook))
        idle = counts < self.revival
        if idle.any():  # the same on all ranks
            everywhere = _gather(pixels)
            codebook[idle] = spread_choice(everywhere, codebook, int(idle.sum()))
            counts[idle] = len(everywhere) / len(counts)


class Codebook(nn.Module):
    """Codes [num_embeddings, width]: a parameter if trainable, else a buffer."""

    weight: Tensor

    def __init__(self, num_embeddings: int, width: int, *, trainable: bool) -> None:
        super().__init__()
        codes = torch.empty(num_embeddings, width).uniform_(-1 / num_embeddings, 1 / num_embeddings)
        if trainable:
            self.weight = nn.Parameter(codes)
        else:
            self.register_buffer("weight", codes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: [N, width] → indices [N] of their nearest codes, and the codes [N, width]."""
        codes = nearest_codes(pixels.detach(), self.weight.detach())
        return codes, F.embedding(codes, self.weight)


def nearest_codes(pixels: Tensor, codebook: Tensor) -> Tensor:
    """Find the nearest code of each pixel: [N, C], [K, C] → indices [N] int64."""
    pixels, codebook = pixels.float(), codebook.float()
    half_norms = 0.5 * codebook.square().sum(dim=1)
    # ½‖z − e‖² − ½‖z‖²: the last term is the same for all codes
    parts = torch.split(pixels, CHUNK)
    chunks = (torch.addmm(half_norms, z, codebook.T, alpha=-1) for z in parts)
    return torch.cat([distances.argmin(dim=1) for distances in chunks])


def spread_choice(pixels: Tensor, codebook: Tensor, count: int) -> Tensor:
    """Choose pixels far from all codes: [N, C], [K, C] → [count, C].

    Systematic sampling: a pixel's share is in proportion to its squared distance from the nearest
    code, the weight of k-means++ (Arthur and Vassilvitskii 2007). Even steps replace random draws.
    """
    nearest = codebook[nearest_codes(pixels, codebook)]
    reached = (pixels - nearest).double().square().sum(1).cumsum(0)
    steps = torch.arange(count, dtype=reached.dtype, device=pixels.device) + 0.5
    chosen = torch.searchsorted(reached, steps / count * reached[-1])
    return pixels[chosen.clamp(max=len(pixels) - 1)]


def _gather(pixels: Tensor) -> Tensor:
    """Concatenate the pixels of all ranks, in their order: [N, C] → [ranks · N, C]."""
    if not dist.is_initialized():
        return pixels
    parts = [torch.empty_like(pixels) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, pixels.contiguous())
    return torch.cat(parts)


def code_counts(codes: Tensor, num_embeddings: int) -> Tensor:
    """Count each code: indices of any shape → [num_embeddings] float64, to sum over batches."""
    return torch.bincount(codes.flatten(), minlength=num_embeddings).double()


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Measure the use of a codebook.

    counts: [num_embeddings] float64, the sum of `code_counts` over all batches and ranks.
    Returns codebook_used_share, the share of codes with a count above 0, in [0, 1], and
    codebook_perplexity, exp(−Σ p log p) for the share p of each code in all counts: from 1 for a
    single code to num_embeddings for codes that occur equally often. It is NaN without any count.
    """
    shares = counts / counts.sum()
    return {
        "codebook_used_share": (counts > 0).double().mean().item(),
        "codebook_perplexity": torch.xlogy(shares, shares).sum().neg().exp().item(),
    }
