"""How faithful a first stage's reconstructions are."""

import torch
from torch import Tensor

PEAK = 2.0
"""Range of pixels in [-1, 1]."""

EIGHT_BIT_MSE = (PEAK / 255) ** 2 / 12
"""Mean squared error of rounding to 8 bits: nothing an image file can show is below it."""


def psnr_db(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image: 10 log10(peak² / MSE), in dB.

    images, reconstructions: [B, C, H, W] in [-1, 1], clamped to it; returns [B] float64.
    At most 58.9 dB, where only the rounding to 8 bits is left: a perfect copy is finite.
    """
    error = reconstructions.double().clamp(-1, 1) - images.double().clamp(-1, 1)
    mse = error.square().flatten(1).mean(1).clamp(min=EIGHT_BIT_MSE)
    return 10 * torch.log10(PEAK**2 / mse)


class MeanPsnr:
    """Mean of the images' PSNR, streamed."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._sum = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Adds images; both [B, C, H, W] in [-1, 1]."""
        values = psnr_db(images, reconstructions).to(self._sum.device)
        self._count += len(values)
        self._sum += values.sum()

    def state(self) -> dict[str, Tensor]:
        """The live float64 sums: all-reducing them in place with SUM merges ranks."""
        return {"count": self._count, "sum": self._sum}

    def compute(self) -> dict[str, float]:
        """psnr_db. Raises ValueError where no image was seen."""
        if not self._count:
            raise ValueError("PSNR needs an image")
        return {"psnr_db": float(self._sum / self._count)}
