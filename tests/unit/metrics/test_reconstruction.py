import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics.reconstruction import MeanPsnr, psnr_db


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 9999), level=st.floats(0.01, 1.0))
def test_psnr_is_that_of_the_eight_bit_images(seed: int, level: float):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, 3, 8, 9)).astype(float)
    noisy = (pixels + 255 * level * rng.standard_normal(pixels.shape)).clip(0, 255)
    mse = ((pixels - noisy) ** 2).mean((1, 2, 3))
    scaled = [torch.from_numpy(x / 127.5 - 1) for x in (pixels, noisy)]
    np.testing.assert_allclose(
        psnr_db(scaled[0], scaled[1]).numpy(), 10 * np.log10(255**2 / mse), atol=1e-9
    )


def test_psnr_clamps_and_stays_finite():
    white = torch.ones(2, 3, 4, 4)
    assert psnr_db(white, 3 * white).tolist() == pytest.approx([58.92] * 2, abs=0.01)
    assert psnr_db(white, -white).tolist() == pytest.approx([0.0] * 2)


def test_mean_is_over_images_and_adds_over_ranks():
    torch.manual_seed(0)
    images = torch.rand(7, 3, 8, 8) * 2 - 1
    copies = images + 0.1 * torch.randn_like(images) * torch.arange(1, 8).view(7, 1, 1, 1)
    ranks = [MeanPsnr(), MeanPsnr()]
    ranks[0].update(images[:5], copies[:5])
    ranks[1].update(images[5:], copies[5:])
    for name, total in ranks[0].state().items():
        total += ranks[1].state()[name]
    result = ranks[0].compute()
    assert list(result) == ["psnr_db"]
    assert math.isclose(result["psnr_db"], psnr_db(images, copies).mean().item())


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="needs an image"):
        MeanPsnr().compute()
