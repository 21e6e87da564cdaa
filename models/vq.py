"""Vector quantisation of latents (van den Oord et al. 2017), and how much of a codebook is used."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

COMMITMENT_WEIGHT = 0.25
CHUNK = 4096
"""Latent pixels compared with the codebook at once: 0.25 GiB of distances to 16384 codes."""


class Quantized(NamedTuple):
    """Latents as the decoder gets them."""

    latents: Tensor
    """[B, C, h, w]: the nearest codes; gradients pass straight through to the input."""
    codes: Tensor
    """[B, h, w] int64: their numbers."""
    loss: Tensor
    """Scalar that pulls codes and latents together."""


class VectorQuantizer(nn.Module):
    """Replaces every latent pixel by its nearest code (van den Oord et al. 2017, equation 2).

    The codebook learns by gradient or, at a decay above 0, as the moving average of the latents
    that chose each code (appendix A.1). Then it is no parameter but a buffer, moved at every
    training forward pass by the latents of all ranks: run them alike. Codes whose average count
    falls below `revival`, and at first all, are moved to latents.
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
        """latents: [B, C, h, w]."""
        pixels = latents.movedim(1, -1)
        codes, nearest = self.embedding(pixels.flatten(0, -2))
        nearest = nearest.view(pixels.shape)
        loss = COMMITMENT_WEIGHT * F.mse_loss(pixels, nearest.detach())
        if self.decay == 0.0:
            loss = loss + F.mse_loss(nearest, pixels.detach())
        elif self.training and torch.is_grad_enabled():
            self._follow(pixels.detach().flatten(0, -2), codes)
        straight_through = pixels + (nearest - pixels).detach()
        return Quantized(straight_through.movedim(-1, 1), codes.view(pixels.shape[:-1]), loss)

    @torch.no_grad()
    def _follow(self, pixels: Tensor, codes: Tensor) -> None:
        """Equations 6 to 8 of appendix A.1; the sum m there is code times count here."""
        codebook, counts = self.embedding.weight, self.counts
        chosen = torch.zeros_like(counts).index_add_(0, codes, torch.ones_like(pixels[:, 0]))
        totals = torch.zeros_like(codebook).index_add_(0, codes, pixels)
        if dist.is_initialized():
            dist.all_reduce(chosen)
            dist.all_reduce(totals)
        counts.mul_(self.decay).add_(chosen, alpha=1 - self.decay)
        # a code that nobody ever chose has a count of 0, and does not move
        rate = (1 - self.decay) / counts.clamp(min=torch.finfo(counts.dtype).tiny)
        codebook.add_(rate[:, None] * (totals - chosen[:, None] * codebook))
        idle = counts < self.revival
        if idle.any():  # on all ranks alike
            everywhere = _gather(pixels)
            codebook[idle] = spread_choice(everywhere, codebook, int(idle.sum()))
            counts[idle] = len(everywhere) / len(counts)


class Codebook(nn.Module):
    """Codes [num_embeddings, width], a parameter where they are trained by gradient."""

    weight: Tensor

    def __init__(self, num_embeddings: int, width: int, *, trainable: bool) -> None:
        super().__init__()
        codes = torch.empty(num_embeddings, width).uniform_(-1 / num_embeddings, 1 / num_embeddings)
        if trainable:
            self.weight = nn.Parameter(codes)
        else:
            self.register_buffer("weight", codes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: [N, width] → the number of the nearest code of each, [N], and it, [N, width]."""
        codes = nearest_codes(pixels.detach(), self.weight.detach())
        return codes, F.embedding(codes, self.weight)


def nearest_codes(pixels: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code of each pixel: [N, C], [K, C] → [N] int64."""
    pixels, codebook = pixels.float(), codebook.float()
    half_norms = 0.5 * codebook.square().sum(dim=1)
    # ½‖z − e‖² less ½‖z‖², which is the same for all codes
    chunks = (torch.addmm(half_norms, z, codebook.T, alpha=-1) for z in pixels.split(CHUNK))
    return torch.cat([distances.argmin(dim=1) for distances in chunks])


def spread_choice(pixels: Tensor, codebook: Tensor, count: int) -> Tensor:
    """Pixels that the codebook serves badly: [N, C], [K, C] → [count, C].

    Systematic sampling in proportion to the squared distance from the nearest code, as k-means++
    draws its seeds (Arthur and Vassilvitskii 2007), with even steps in the place of draws.
    """
    nearest = codebook[nearest_codes(pixels, codebook)]
    reached = (pixels - nearest).double().square().sum(1).cumsum(0)
    steps = torch.arange(count, dtype=reached.dtype, device=pixels.device) + 0.5
    chosen = torch.searchsorted(reached, steps / count * reached[-1])
    return pixels[chosen.clamp(max=len(pixels) - 1)]


def _gather(pixels: Tensor) -> Tensor:
    """Of all ranks, in their order: [N, C] → [ranks · N, C]."""
    if not dist.is_initialized():
        return pixels
    parts = [torch.empty_like(pixels) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, pixels.contiguous())
    return torch.cat(parts)


def code_counts(codes: Tensor, num_embeddings: int) -> Tensor:
    """How often each code occurs: [num_embeddings] float64; sum them over batches and ranks."""
    return torch.bincount(codes.flatten(), minlength=num_embeddings).double()


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Share of the codes that occur, and their perplexity, exp of the entropy of their shares."""
    shares = counts / counts.sum()
    return {
        "codebook_used_share": (counts > 0).double().mean().item(),
        "codebook_perplexity": torch.special.entr(shares).sum().exp().item(),
    }
