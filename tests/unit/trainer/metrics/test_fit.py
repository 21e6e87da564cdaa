"""Metrics of samples against the images and label maps of their conditions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.conditioning.given import Given
from models.conditioning.inpainting import Inpainting
from models.config import ConditionerConfig
from trainer.cli import load_config
from trainer.metrics.fit import AGREE, SMALLEST_REGION, Batch, InpaintingFit, MapFit, build_fit

CPU = torch.device("cpu")


def batch_of(given: Given, images: Tensor) -> Batch:
    inputs = {} if given.masks is None else Inpainting(ConditionerConfig()).prepare(given, (8, 8))
    return Batch(given=given, images=images, features=[], inputs=inputs, reconstruct=nn.Identity())


def agreement(truth: Tensor, images: Tensor, maps: Tensor) -> float:
    """The share, by loops over images and classes."""
    agreed, total = 0, 0
    for one, other, labels in zip(truth, images, maps, strict=True):
        for label in np.unique(labels.numpy()).tolist():
            inside = labels == label
            size = int(inside.sum())
            if size >= SMALLEST_REGION:
                colours = [pixels[:, inside].double().mean(1) for pixels in (one, other)]
                distance = (colours[0] - colours[1]).square().mean().sqrt()
                agreed, total = agreed + size * bool(distance <= AGREE), total + size
    return agreed / total


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([2, 5, 40]))
def test_the_agreement_is_that_of_plain_loops(seed: int, count: int, classes: int) -> None:
    torch.manual_seed(seed)
    truth = torch.rand(count, 3, 16, 20) * 2 - 1
    images = truth + torch.randn(count, 3, 1, 1) * AGREE
    maps = torch.randint(classes, (count, 4, 5)).byte()
    maps = maps.repeat_interleave(4, 1).repeat_interleave(4, 2)
    fit = MapFit(CPU)
    fit.update(batch_of(Given([""] * count, truth, maps), images))
    found = fit.compute()
    assert found["colour_agreement"] == pytest.approx(agreement(truth, images, maps))
    if count == 1:
        assert found.keys() == {"colour_agreement"}  # one map cannot be shuffled
    else:
        shuffled = agreement(truth.roll(1, 0), images, maps.roll(1, 0))
        assert found["shuffled/colour_agreement"] == pytest.approx(shuffled)


def inpainting() -> InpaintingFit:
    options = ["conditioner=inpainting", "data.store_images=true", "unet.in_channels=9"]
    options += ["unet.context_dim=0", "eval.clip_score=false"]
    options += ["eval.perceptual_features=efficientnet_lite0"]
    fit = build_fit(load_config(["+experiment=emoji", *options]), [], CPU, baselines=True)
    assert isinstance(fit, InpaintingFit)
    return fit


def test_holes_are_compared_with_their_mean_colour_and_with_other_images() -> None:
    fit, truth = inpainting(), torch.rand(3, 3, 32, 32) * 2 - 1
    holes = torch.zeros(3, 1, 32, 32)
    holes[:, :, 8:24, 4:20] = 1
    samples = torch.where(holes > 0, truth + 0.1, truth).clamp(-1, 1)
    fit.update(batch_of(Given([""] * 3, truth, masks=holes), samples))
    found = fit.compute()
    assert found["psnr_db"] > found["mean_colour/psnr_db"] > found["shuffled/psnr_db"]
    inside = holes.expand_as(truth) > 0
    known = torch.where(inside, torch.nan, truth)
    mean = known.nanmean((2, 3), keepdim=True)
    filled = torch.where(inside, mean, truth)
    expected = 10 * torch.log10(4 / (filled - truth).double().square().mean((1, 2, 3)))
    assert found["mean_colour/psnr_db"] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_a_whole_image_may_be_missing_and_one_sample_has_no_control() -> None:
    fit, truth = inpainting(), torch.rand(1, 3, 32, 32) * 2 - 1
    fit.update(batch_of(Given([""], truth, masks=torch.ones(1, 1, 32, 32)), truth * 0.5))
    found = fit.compute()
    assert all(np.isfinite(value) for value in found.values())
    assert not [name for name in found if name.startswith("shuffled/")]


def test_captions_have_no_such_metrics() -> None:
    assert build_fit(load_config(["+experiment=emoji"]), [], CPU, baselines=True) is None
