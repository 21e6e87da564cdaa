"""trainer.sample in real processes: from a checkpoint or an export, on one rank or on two."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import Workshop
from tests.integration.test_training import ROOT
from trainer.config import Config
from trainer.exporting import export
from trainer.loop import fit
from trainer.sampling import draw

PROMPTS = ["a red circle", "a blue square", "a green circle"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sampling") / "run"


@pytest.fixture(scope="module")
def overrides(workshop: Workshop, run: Path) -> list[str]:
    """Of a trained run with an export, whose prompts come from a file and the command line."""
    listed = run.parent / "prompts.txt"
    listed.write_text(f"\n{PROMPTS[1]}  \n\n{PROMPTS[2]}\n")
    options = [
        *("train.max_steps=1", "sampler.guidance_scale=3", f"sample.prompts=[{PROMPTS[0]}]"),
        *(f"sample.prompts_file={listed}", "sample.images_per_prompt=2", "sample.batch_size=2"),
    ]
    config = workshop.config("emoji", *options, run=run)
    assert fit(config) == 0
    export(config)
    draw(config)
    return workshop.overrides("emoji", *options, run=run)


@pytest.fixture(scope="module")
def config(workshop: Workshop, overrides: list[str], run: Path) -> Config:
    return workshop.config("emoji", *overrides[1:], run=run)


def pictures(folder: Path) -> NDArray[np.int64]:
    """[6, 32, 32, 3]."""
    paths = sorted(folder.glob("0*.png"))
    assert [path.name for path in paths] == [f"{number:05d}.png" for number in range(6)]
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(np.int64)


def test_each_picture_says_what_it_is_of(config: Config):
    folder = Path(config.sample.out)
    assert len(np.unique(pictures(folder), axis=0)) == 6
    for number in range(6):
        with Image.open(folder / f"{number:05d}.png") as image:
            about = json.loads(image.info["parameters"])
        assert about["prompt"] == PROMPTS[number % 3]
        assert (about["sample"], about["step"], about["guidance_scale"]) == (number, 1, 3.0)
    with Image.open(folder / "sheet.png") as sheet:
        assert json.loads(sheet.info["parameters"])["prompts"] == PROMPTS


def test_two_ranks_draw_what_one_draws(config: Config, overrides: list[str], tmp_path: Path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "trainer.sample", *overrides, f"sample.out={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 images in") == 1
    difference = pictures(tmp_path) - pictures(Path(config.sample.out))
    assert np.abs(difference).max() <= 1  # this process may sum with more threads than the ranks
    assert (tmp_path / "sheet.png").exists()


def test_an_export_draws_what_its_checkpoint_draws(config: Config, tmp_path: Path):
    sample = replace(config.sample, export=config.export.out, out=str(tmp_path))
    draw(replace(config, sample=sample))
    difference = pictures(tmp_path) - pictures(Path(config.sample.out))
    assert np.abs(difference).mean() < 0.1


def test_more_images_leave_the_first_as_they_are(config: Config, tmp_path: Path):
    one = replace(config.sample, images_per_prompt=1, batch_size=3, out=str(tmp_path))
    draw(replace(config, sample=one))
    for number in range(3):
        name = f"{number:05d}.png"
        first, again = (Image.open(Path(at) / name) for at in (config.sample.out, tmp_path))
        difference = np.asarray(first).astype(int) - np.asarray(again)
        assert np.abs(difference).mean() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [], "prompts_file": ""}, r"no prompts: .*sample\.prompts_file"),
        ({"prompts_file": "nowhere.txt"}, r"sample\.prompts_file: .*nowhere\.txt"),
        ({"export": "nowhere"}, r"sample\.export: nowhere.*trainer\.export"),
    ],
)
def test_what_is_missing_is_named(change: dict[str, object], message: str, config: Config):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        draw(replace(config, sample=replace(config.sample, **change)))
