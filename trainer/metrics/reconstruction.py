"""Metrics of a first stage's reconstructions: PSNR, SSIM, a perceptual distance, rFID."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.choices import Features
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.frechet import frechet_distance
from trainer.metrics.moments import GaussianMoments
from trainer.pictures.png import to_uint8

PEAK = 2.0
"""Peak-to-peak range of pixels in [-1, 1]."""

EIGHT_BIT_MSE = (PEAK / 255) ** 2 / 12
"""Mean squared error of rounding to 8 bits; errors below it are invisible in an image file."""

WINDOW, WINDOW_STD = 11, 1.5
STABILISERS = (0.01, 0.03)
"""SSIM's window in pixels and its K1 and K2 (Wang et al. 2004, section III.C)."""


def psnr_db(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image: 10 log10(peak² / MSE), in dB.

    images, reconstructions: [B, C, H, W] in [-1, 1], clamped to it; returns [B] float64.
    At most 58.9 dB, the ratio of rounding to 8 bits; therefore a perfect copy has a finite value.
    """
    error = reconstructions.double().clamp(-1, 1) - images.double().clamp(-1, 1)
    mse = error.square().flatten(1).mean(1).clamp(min=EIGHT_BIT_MSE)
    return 10 * torch.log10(PEAK**2 / mse)


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Compute the structural similarity of each image (Wang et al. 2004, equation 13).

    images, reconstructions: [B, C, H, W] in [-1, 1], clamped to it; returns [B] float64, at most 1:
    the mean over channels and over all positions of the Gaussian window inside the image.
    Raises: ValueError for images smaller than the window.
    """
    channels, height, width = images.shape[1:]
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM's window of {WINDOW} pixels is larger than {height} x {width}")
    at = torch.arange(WINDOW, dtype=torch.float64, device=images.device) - WINDOW // 2
    profile = torch.exp(-0.5 * (at / WINDOW_STD).square())
    profile = (profile / profile.sum()).expand(channels, 1, WINDOW)

    def smooth(x: Tensor) -> Tensor:
        rows = F.conv2d(x, profile[:, :, None, :], groups=channels)
        return F.conv2d(rows, profile[:, :, :, None], groups=channels)

    x, y = images.double().clamp(-1, 1), reconstructions.double().clamp(-1, 1)
    mean_x, mean_y = smooth(x), smooth(y)
    var_x = smooth(x.square()) - mean_x.square()
    var_y = smooth(y.square()) - mean_y.square()
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = ((k * PEAK) ** 2 for k in STABILISERS)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


class ReconstructionMetrics:
    """Means of the metrics over streamed images, and Fréchet distances from the originals."""

    def __init__(
        self,
        extractors: Sequence[FeatureExtractor] = (),
        perceptual: tuple[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """perceptual: name and function of a distance; it maps two [B, 3, H, W] to [B].

        extractors: for Fréchet distances, one each. device: of the sums.
        """
        self._extractors = list(extractors)
        self._perceptual = perceptual
        names = ["psnr_db", "ssim"] + ([] if perceptual is None else [perceptual[0]])
        self._sums = {
            name: torch.zeros((), dtype=torch.float64, device=device) for name in ["count", *names]
        }
        self._moments = [
            [GaussianMoments(extractor.num_features, device) for _ in range(2)]
            for extractor in self._extractors
        ]

    def update(
        self,
        images: Tensor,
        reconstructions: Tensor,
        features: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        """Add images; both [B, 3, H, W], clamped to [-1, 1].

        features: of images and of reconstructions, [B, D] for each extractor; None: extract them.
        Raises: ValueError for images smaller than SSIM's window.
        """
        images, reconstructions = images.float().clamp(-1, 1), reconstructions.float().clamp(-1, 1)
        values = {
            "psnr_db": psnr_db(images, reconstructions),
            "ssim": ssim(images, reconstructions),
        }
        if self._perceptual is not None:
            name, distance = self._perceptual
            values[name] = distance(images, reconstructions)
        self._sums["count"] += len(images)
        for name, value in values.items():
            self._sums[name] += value.double().sum()
        if features is None:
            features = self.extract(images), self.extract(reconstructions)
        for moments, *both in zip(self._moments, *features, strict=True):
            for total, found in zip(moments, both, strict=True):
                total.update(found)

    def extract(self, images: Tensor) -> list[Tensor]:
        """Extract features of images [B, 3, H, W] in [-1, 1]: [B, D] for each extractor."""
        pixels = to_uint8(images).to(images.device)
        return [extractor(pixels) for extractor in self._extractors]

    def state(self) -> dict[str, Tensor]:
        """Return the float64 sums themselves, no copies: a sum over ranks in place merges ranks."""
        state = dict(self._sums)
        for number, moments in enumerate(self._moments):
            for side, total in zip(("images", "reconstructions"), moments, strict=True):
                state |= {f"{number}/{side}/{key}": v for key, v in total.state().items()}
        return state

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self._sums["count"])

    def compute(self) -> dict[str, float]:
        """Return the metrics by name.

        Raises: ValueError without images; for Fréchet distances, with fewer than two.
        """
        count = self.count
        if not count:
            raise ValueError("reconstructions are measured on images, and there is none")
        values = {
            name: float(total) / count for name, total in self._sums.items() if name != "count"
        }
        for extractor, (images, reconstructions) in zip(
            self._extractors, self._moments, strict=True
        ):
            # the name FID is for Inception's features alone
            inception = extractor.name is Features.inception
            name = "rfid" if inception else f"rfd_{extractor.name}"
            values[name] = frechet_distance(reconstructions, images)
        return values
