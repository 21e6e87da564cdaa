"""trainer.sample in real processes: from a checkpoint or an export, on one rank or on two."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.config import ConditionerKind, NoiseSchedule
from tests.support.processes import run_command
from tests.support.workshop import Workshop
from trainer.config import Config
from trainer.export.job import export
from trainer.sample.job import draw
from trainer.train.loop import fit

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
        f"sample.out={run.parent / 'drawn'}",
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


def test_each_picture_says_what_it_is_of(config: Config) -> None:
    folder = Path(config.sample.out)
    assert len(np.unique(pictures(folder), axis=0)) == 6
    for number in range(6):
        with Image.open(folder / f"{number:05d}.png") as image:
            about = json.loads(image.info["parameters"])
        assert about["prompt"] == PROMPTS[number % 3]
        assert (about["sample"], about["step"], about["guidance_scale"]) == (number, 1, 3.0)
    with Image.open(folder / "sheet.png") as sheet:
        assert json.loads(sheet.info["parameters"])["prompts"] == PROMPTS


def test_two_ranks_draw_what_one_draws(
    config: Config, overrides: list[str], tmp_path: Path
) -> None:
    done = run_command("trainer.sample", *overrides, f"sample.out={tmp_path}", ranks=2)
    assert done.code == 0, done.err
    assert done.out.count("6 images in") == 1
    difference = pictures(tmp_path) - pictures(Path(config.sample.out))
    assert np.abs(difference).max() <= 1  # this process may sum with more threads than the ranks
    assert (tmp_path / "sheet.png").exists()


def test_an_export_draws_what_its_checkpoint_draws(config: Config, tmp_path: Path) -> None:
    sample = replace(config.sample, export=config.export.out, out=str(tmp_path))
    draw(replace(config, sample=sample))
    difference = pictures(tmp_path) - pictures(Path(config.sample.out))
    assert np.abs(difference).mean() < 0.1


def test_pictures_of_another_size_have_a_folder_of_their_own(config: Config) -> None:
    sample = replace(config.sample, width=64, out="", images_per_prompt=1)
    draw(replace(config, sample=sample))
    draw(replace(config, sample=replace(sample, width=0)))
    sizes: set[tuple[int, int]] = set()
    for path in (Path(config.run.dir) / "samples").glob("*/00000.png"):
        assert path.with_name("sheet.png").exists()
        with Image.open(path) as picture:
            sizes.add(picture.size)
    assert sizes == {(64, 32), (32, 32)}


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        ("unet", "heads", [2, 2], r"unet\.heads is \[2, 2\], that of the export is \[1, 2\]"),
        ("unet", "norm_groups", 4, r"unet\.norm_groups is 4, that of the export is 8"),
        ("diffusion", "zero_terminal_snr", False, r"diffusion\.zero_terminal_snr is False"),
        ("diffusion", "prediction_type", "epsilon", r"prediction_type is epsilon, .* v_prediction"),
        ("diffusion", "schedule", NoiseSchedule.flow, r"diffusion\.schedule is flow"),
    ],
)
def test_an_export_of_another_model_is_refused(
    section: str, name: str, value: object, said: str, config: Config
) -> None:
    changed = replace(getattr(config, section), **{name: value})
    sample = replace(config.sample, export=config.export.out)
    with pytest.raises(ValueError, match=rf"^sample\.export: .*{said}"):
        draw(replace(config, sample=sample, **{section: changed}))


def test_an_export_without_the_weights_of_the_conditioner_is_refused(config: Config) -> None:
    classes = replace(config.conditioner, kind=ConditionerKind.class_label, num_classes=3)
    sample = replace(config.sample, export=config.export.out)
    with pytest.raises(ValueError, match=r"^sample\.export: .*conditioner\.kind=class_label"):
        draw(replace(config, sample=sample, conditioner=classes))


def test_more_images_leave_the_first_as_they_are(config: Config, tmp_path: Path) -> None:
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
def test_what_is_missing_is_named(change: dict[str, object], message: str, config: Config) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        draw(replace(config, sample=replace(config.sample, **change)))
