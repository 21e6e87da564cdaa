"""The examples run as they are, on small data."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from examples import minimal
from tests.support.workshop import Workshop
from trainer.precompute.job import precompute

SHIPPED_STAGE = [
    "autoencoder.block_out_channels=[16,32,64]",
    "autoencoder.norm_groups=8",
    f"autoencoder.weights={minimal.AUTOENCODER.weights}",
]


def test_the_minimal_example_learns_and_draws(workshop: Workshop, tmp_path: Path) -> None:
    latents, sheet = tmp_path / "latents", tmp_path / "drawn" / "sheet.png"
    precompute(workshop.config("emoji", *SHIPPED_STAGE, f"data.latents={latents}"))
    losses = minimal.main(latents, sheet, steps=60)
    assert len(losses) == 60
    assert all(map(math.isfinite, losses))
    # the U-Net starts with an output of 0, and the variance of v is 1
    assert abs(losses[0] - 1) < 0.1
    assert np.mean(losses[-10:]) < 0.85
    pixels = np.asarray(Image.open(sheet))
    # pictures of 32 pixels, with 2 pixels between them and around
    assert pixels.shape == (2 * 34 + 2, 6 * 34 + 2, 3)
    assert pixels[2:34, 2:34].std() > 5
