import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from trainer.config import Features
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.frechet import frechet_distance
from trainer.metrics.moments import GaussianMoments
from trainer.metrics.reconstruction import ReconstructionMetrics, psnr_db, ssim
from trainer.pictures.png import to_uint8


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 9999), level=st.floats(0.01, 1.0))
def test_psnr_is_that_of_the_eight_bit_images(seed: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, 3, 8, 9)).astype(float)
    noisy = (pixels + 255 * level * rng.standard_normal(pixels.shape)).clip(0, 255)
    mse = ((pixels - noisy) ** 2).mean((1, 2, 3))
    scaled = [torch.from_numpy(x / 127.5 - 1) for x in (pixels, noisy)]
    np.testing.assert_allclose(
        psnr_db(scaled[0], scaled[1]).numpy(), 10 * np.log10(255**2 / mse), atol=1e-9
    )


def test_psnr_clamps_and_stays_finite() -> None:
    white = torch.ones(2, 3, 4, 4)
    assert psnr_db(white, 3 * white).tolist() == pytest.approx([58.92] * 2, abs=0.01)
    assert psnr_db(white, -white).tolist() == pytest.approx([0.0] * 2)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 9999), level=st.floats(0.0, 2.0), side=st.integers(11, 24))
def test_ssim_is_scikit_images(seed: int, level: float, side: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (2, 3, side, 14))
    copies = images + level * rng.standard_normal(images.shape)
    expected = [
        structural_similarity(
            image,
            copy.clip(-1, 1),
            channel_axis=0,
            data_range=2.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for image, copy in zip(images, copies, strict=True)
    ]
    found = ssim(torch.from_numpy(images), torch.from_numpy(copies))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ValueError, match="window of 11 pixels"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


class Means(FeatureExtractor):
    """Four numbers of an image."""

    def __init__(self, name: Features) -> None:
        super().__init__(name, 4, nn.Linear(1, 1), resize="none")

    def pooled(self, images: Tensor) -> Tensor:
        pixels = images.float()
        return torch.cat([pixels.mean((2, 3)), pixels.std((1, 2, 3))[:, None]], dim=1)


def l1(images: Tensor, others: Tensor) -> Tensor:
    return (images - others).abs().mean((1, 2, 3))


def test_means_and_distances_add_over_ranks() -> None:
    torch.manual_seed(0)
    images = torch.rand(9, 3, 12, 12) * 2 - 1
    copies = images + 0.1 * torch.randn_like(images) * torch.arange(1, 10).view(9, 1, 1, 1)
    extractors = [Means(Features.efficientnet_lite0), Means(Features.inception)]
    ranks = [ReconstructionMetrics(extractors, ("lpips", l1)) for _ in range(2)]
    ranks[0].update(images[:5], copies[:5])
    ranks[1].update(images[5:], copies[5:])
    for name, total in ranks[0].state().items():
        total += ranks[1].state()[name]
    moments = []
    for pixels in (images, copies):
        moments.append(GaussianMoments(4))
        moments[-1].update(extractors[0](to_uint8(pixels)))
    distance = frechet_distance(*moments)
    assert ranks[0].compute() == pytest.approx(
        {
            "psnr_db": psnr_db(images, copies).mean().item(),
            "ssim": ssim(images, copies).mean().item(),
            "lpips": l1(images, copies.clamp(-1, 1)).mean().item(),
            "rfd_efficientnet_lite0": distance,
            "rfid": distance,
        },
        rel=1e-6,
    )
    assert distance > 0.1


def test_a_perfect_copy_is_at_no_distance() -> None:
    images = torch.rand(6, 3, 12, 12) * 2 - 1
    metrics = ReconstructionMetrics([Means(Features.efficientnet_lite0)])
    metrics.update(images, images)
    values = metrics.compute()
    assert math.isclose(values["ssim"], 1.0)
    assert values["rfd_efficientnet_lite0"] == pytest.approx(0.0, abs=1e-6)


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="there is none"):
        ReconstructionMetrics().compute()
