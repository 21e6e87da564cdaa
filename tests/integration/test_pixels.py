"""A denoiser of pixels: from packed pictures to drawn and measured ones, without a first stage."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.workshop import Workshop, losses
from trainer.checkpoints.reader import chosen_checkpoint
from trainer.config import Config
from trainer.evaluate.job import evaluate
from trainer.export.job import export
from trainer.plan.job import plan
from trainer.precompute.job import precompute
from trainer.runtime.ranks import ALONE
from trainer.sample.job import draw
from trainer.streams import open_images, open_latents
from trainer.train.loop import fit

PIXELS = ["autoencoder=identity", "unet.in_channels=3", "unet.out_channels=3"]
SHORT = ["train.max_steps=4", "checkpoint.every=2", "optim.schedule=constant", "eval.every=4"]


@pytest.fixture(scope="module")
def trained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("pixels")
    words = [*PIXELS, *SHORT, f"data.latents={folder / 'latents'}", "autoencoder.weights="]
    config = workshop.config("emoji", *words, run=folder / "run")
    precompute(config)
    assert fit(config) == 0
    return config


def test_stored_latents_are_the_pictures(trained: Config) -> None:
    latents, images = open_latents(trained, ALONE), open_images(trained, ALONE, "train")
    numbers = np.arange(4)
    moments = latents.read(numbers).arrays["moments"].float()
    expected = images.read(numbers).arrays["images"]
    torch.testing.assert_close(moments[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_a_run_learns_draws_and_measures(
    trained: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(trained.run.dir)
    assert sorted(losses(run)) == [1, 2, 3, 4]
    options = replace(trained.sample, out=str(tmp_path), prompts=["a red circle"])
    config = replace(trained, sample=options, plan=replace(trained.plan, gpus_per_node=1))
    draw(config)
    with Image.open(tmp_path / "00000.png") as picture:
        assert picture.size == (32, 32)
    evaluate(config)
    plan(config)
    said = capsys.readouterr().out
    assert "frozen parameters" in said
    assert "fits" in said


def test_a_stopped_run_goes_on_bit_for_bit(
    trained: Config, workshop: Workshop, tmp_path: Path
) -> None:
    words = [*PIXELS, *SHORT, f"data.latents={trained.data.latents}", "autoencoder.weights="]
    for steps in (2, 4):
        config = workshop.config("emoji", *words, f"train.max_steps={steps}", run=tmp_path)
        assert fit(config) == 0
    whole, parts = (chosen_checkpoint(one).tensors("weight")["weight"] for one in (trained, config))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_an_export_is_refused_with_the_other_way(trained: Config) -> None:
    with pytest.raises(
        ValueError, match=r"autoencoder\.kind=identity: .* draw with trainer\.sample"
    ):
        export(trained)
