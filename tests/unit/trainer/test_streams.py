"""The random choices of training: functions of (seed, epoch, sample), within the options."""

import numpy as np
import pytest

from data.config import DataConfig
from data.streams.stream import Visits
from tests.support.data_sets import DataSet
from trainer.cli import load_config
from trainer.runtime.ranks import ALONE
from trainer.streams import open_images

RANDOM = ["data.crop=random", "data.crop_sides=[0.5,0.8]"]
SAMPLES = np.arange(2000)


def visits(data: DataConfig, *options: str, epoch: int = 0, split: str = "train") -> Visits:
    words = [f"data.train={data.train}", f"data.val={data.train}", "data.lanes=1"]
    config = load_config(["+experiment=emoji_autoencoder", *words, *options])
    stream = open_images(config, ALONE, "train" if split == "train" else "val")
    return stream.randomness.visits(np.full_like(SAMPLES, epoch), SAMPLES)


def test_crops_are_functions_of_seed_epoch_and_sample(image_set: DataSet) -> None:
    data = image_set()
    first = visits(data, *RANDOM).crop
    np.testing.assert_array_equal(first, visits(data, *RANDOM).crop)
    for other in (visits(data, *RANDOM, "run.seed=1"), visits(data, *RANDOM, epoch=1)):
        assert (other.crop != first).all()
    lowest, highest = first.min(0), first.max(0)
    np.testing.assert_allclose(lowest, [0.5, 0, 0], atol=0.005)
    np.testing.assert_allclose(highest, [0.8, 1, 1], atol=0.005)
    assert (lowest >= [0.5, 0, 0]).all()
    assert (highest <= [0.8, 1, 1]).all()


def test_the_crop_is_the_centre_by_default_and_in_validation(image_set: DataSet) -> None:
    data = image_set()
    for found in (visits(data), visits(data, *RANDOM, split="val")):
        assert found.crop.tolist() == [[1.0, 0.5, 0.5]] * len(SAMPLES)


@pytest.mark.parametrize(
    ("experiment", "options", "words"),
    [
        ("emoji_autoencoder", RANDOM[1:], r"data\.crop_sides=.* set data\.crop=random"),
        ("emoji_autoencoder", [RANDOM[0], "data.crop_sides=[1,0.5]"], r"\[smallest, largest\]"),
        ("emoji", RANDOM, r"data\.crop=random: stored latents have the centre crop"),
    ],
)
def test_crops_that_cannot_be_are_refused(experiment: str, options: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_config([f"+experiment={experiment}", *options])
