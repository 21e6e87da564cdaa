"""Conditions with networks of their own, from data to numbers: each as exact as captions are."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from data.order.batches import Share
from data.shards.manifest import Manifest
from data.streams.latents import LatentStream
from data.streams.stream import Randomness
from models.config.conditioning import CONDITIONERS
from tests.support.conditions import KINDS, SHAPE, with_conditions
from tests.support.processes import walk
from tests.support.workshop import Workshop, losses
from trainer.checkpoints.reader import chosen_checkpoint
from trainer.config import Config
from trainer.evaluate.job import evaluate
from trainer.precompute.job import precompute
from trainer.sample.job import draw
from trainer.train.loop import fit

STEPS = 6
TRAIN = ["checkpoint.every=3", "data.flip=true", "optim.schedule=constant", "optim.lr=0.01"]
MEASURE = ["eval.features=[efficientnet_lite0]", "eval.num_samples=8", "eval.batch_size=3"]
SAME = 2e-5
EXPERIMENTS = sorted(KINDS)
PAIRED = [experiment for experiment in EXPERIMENTS if experiment != "scenes_text"]
"""Those whose samples have an image that they should be like."""


@pytest.fixture(scope="module")
def shop(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return with_conditions(workshop, tmp_path_factory.mktemp("conditions"))


@pytest.fixture(scope="module")
def runs(shop: Workshop) -> dict[str, Path]:
    """An undisturbed training of each kind."""
    found = {experiment: shop.folder / experiment for experiment in EXPERIMENTS}
    for experiment, run in found.items():
        assert fit(config_of(shop, experiment, f"train.max_steps={STEPS}", run=run)) == 0
    return found


def config_of(shop: Workshop, experiment: str, *options: str, run: Path) -> Config:
    return shop.config(experiment, *TRAIN, *KINDS[experiment], *options, run=run)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def averaged(config: Config) -> dict[str, torch.Tensor]:
    return dict(chosen_checkpoint(config).average("")[1])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    experiment: str, shop: Workshop, runs: dict[str, Path], tmp_path: Path
) -> None:
    assert fit(config_of(shop, experiment, "train.max_steps=3", run=tmp_path)) == 0
    config = config_of(shop, experiment, f"train.max_steps={STEPS}", run=tmp_path)
    assert fit(config) == 0
    assert losses(tmp_path) == losses(runs[experiment])
    whole = config_of(shop, experiment, f"train.max_steps={STEPS}", run=runs[experiment])
    mine, theirs = averaged(config), averaged(whole)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_loss_curve_knows_nothing_of_ranks_workers_and_micro_batches(
    shop: Workshop, runs: dict[str, Path], tmp_path: Path
) -> None:
    others = {experiment: tmp_path / experiment for experiment in EXPERIMENTS}
    more = [f"train.max_steps={STEPS}", "train.micro_batch_size=2", "data.workers=2"]
    overrides = [
        shop.overrides(experiment, *TRAIN, *KINDS[experiment], *more, run=run)
        for experiment, run in others.items()
    ]
    walk(tmp_path, 2, overrides)
    for experiment, run in others.items():
        assert losses(run) == pytest.approx(losses(runs[experiment]), abs=SAME), experiment


@pytest.mark.parametrize("experiment", PAIRED)
def test_samples_follow_their_condition_and_are_measured(
    experiment: str, shop: Workshop, runs: dict[str, Path]
) -> None:
    config = config_of(
        shop, experiment, f"train.max_steps={STEPS}", *MEASURE,
        "eval.perceptual_features=efficientnet_lite0", run=runs[experiment],
    )  # fmt: skip
    evaluate(config)
    (numbers,) = (runs[experiment] / "evaluations").glob("*.json")
    found: dict[str, Any] = json.loads(numbers.read_text())
    if experiment == "scenes_semantic_map":
        assert 0 <= found["colour_agreement"] <= 1
        assert 0 <= found["shuffled/colour_agreement"] <= 1
    elif experiment != "scenes_layout":  # which has no such numbers yet
        method = "bicubic" if "super" in experiment else "mean_colour"
        for name in ("psnr_db", "ssim", "perceptual_efficientnet_lite0"):
            values = [found[prefix + name] for prefix in ("", "shuffled/", f"{method}/")]
            assert len({*values}) == 3, name
        assert found[f"{method}/psnr_db"] > found["shuffled/psnr_db"]
    rows, columns = 3, 8  # conditions, samples and images
    assert size_of(numbers.with_suffix(".png")) == (columns * 34 + 2, rows * 34 + 2)


def test_images_beside_latents_are_those_that_were_encoded(shop: Workshop) -> None:
    config = shop.config("emoji", "data.store_images=true", "data.maps=true")

    def read(workers: int, flip: bool) -> Any:
        config.data.workers = workers
        share = Share(seed=0, rank=0, world=1, global_batch=8, micro_batch=8)
        flips = Randomness(flip=lambda epoch, index: np.full(len(index), flip))
        stream = LatentStream.open(config.data, share, flips)
        steps = stream.steps(0)
        (batch,) = next(steps)
        steps.close()
        return batch

    plain, mirrored, apart = read(0, False), read(0, True), read(2, False)
    assert plain.keys == mirrored.keys == apart.keys
    for name in ("images", "map", "moments"):
        assert torch.equal(plain.arrays[name], apart.arrays[name])
    assert torch.equal(plain.arrays["images"].flip(3), mirrored.arrays["images"])
    assert torch.equal(plain.arrays["map"].flip(2), mirrored.arrays["map"])
    inside = plain.arrays["map"] == SHAPE
    images = plain.arrays["images"].permute(0, 2, 3, 1)
    assert (images[~inside] > 0.9).float().mean() > 0.9
    assert (images[inside] > 0.9).all(1).float().mean() < 0.1


def test_latents_without_images_are_refused_by_name(
    workshop: Workshop, shop: Workshop, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"conditioner\.kind=inpainting needs data\.store_images"):
        shop.config("emoji_inpainting", "data.store_images=false")
    config = workshop.config("emoji_inpainting", run=tmp_path)
    with pytest.raises(ValueError, match=r"^data\.store_images: data\.latents has no images"):
        fit(config)
    identity = Manifest.load(config.data.latents, option="data.latents").latents
    assert identity is not None
    assert not identity.images
    with pytest.raises(ValueError, match=r"data\.store_images"):  # another identity
        precompute(config)


def test_a_picture_of_any_size_is_enlarged(
    shop: Workshop, runs: dict[str, Path], tmp_path: Path
) -> None:
    sizes = [(8, 8), (13, 7), (13, 7)]
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size, "red").save(path)
    files = ",".join(str(path) for path in paths)
    config = config_of(
        shop, "emoji_super_resolution", f"sample.images=[{files}]", "sample.images_per_prompt=2",
        f"sample.out={tmp_path / 'drawn'}", "sample.batch_size=4",
        run=runs["emoji_super_resolution"],
    )  # fmt: skip
    draw(config)
    found = [size_of(tmp_path / "drawn" / f"{number:05d}.png") for number in range(6)]
    assert found == [(32, 32), (52, 28), (52, 28)] * 2
    assert size_of(tmp_path / "drawn" / "condition_00001.png") == (13, 7)
    assert (tmp_path / "drawn" / "sheet.png").exists()


def test_known_pixels_stay_and_the_hole_is_filled(
    shop: Workshop, runs: dict[str, Path], tmp_path: Path
) -> None:
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    hole = np.zeros((20, 28), np.uint8)
    hole[5:12, 9:20] = 255
    Image.fromarray(hole).save(mask)
    config = config_of(
        shop, "emoji_inpainting", f"sample.images=[{picture}]", f"sample.masks=[{mask}]",
        f"sample.out={tmp_path / 'drawn'}", run=runs["emoji_inpainting"],
    )  # fmt: skip
    draw(config)
    with Image.open(tmp_path / "drawn" / "00000.png") as image:
        drawn = np.asarray(image)
    assert np.array_equal(drawn[hole == 0], pixels[hole == 0])
    assert not np.array_equal(drawn[hole > 0], pixels[hole > 0])


def test_a_map_is_drawn_larger_than_trained_and_not_square(
    shop: Workshop, runs: dict[str, Path], tmp_path: Path
) -> None:
    labels = np.zeros((48, 71), np.uint8)
    labels[10:30, 20:60] = 1
    Image.fromarray(labels).save(tmp_path / "map.png")
    config = config_of(
        shop, "scenes_semantic_map", f"sample.maps=[{tmp_path / 'map.png'}]",
        f"sample.out={tmp_path / 'drawn'}", run=runs["scenes_semantic_map"],
    )  # fmt: skip
    draw(config)
    assert size_of(tmp_path / "drawn" / "00000.png") == (71, 48)


def test_a_layout_is_drawn_beside_its_boxes_and_decides_the_image(
    shop: Workshop, runs: dict[str, Path], tmp_path: Path
) -> None:
    layouts = {
        "circle": [{"label": "circle", "box": [0.1, 0.1, 0.6, 0.6]}],
        "square": [{"label": "square", "box": [0.5, 0.4, 1.0, 0.9]}] * 40,
        "nothing": [],
    }
    for name, boxes in layouts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(boxes))

    def drawn(out: str, *options: str, names: Sequence[str]) -> Path:
        files = ",".join(str(tmp_path / f"{name}.json") for name in names)
        draw(
            config_of(
                shop, "scenes_layout", f"sample.boxes=[{files}]", f"sample.out={tmp_path / out}",
                *options, run=runs["scenes_layout"],
            )
        )  # fmt: skip
        return tmp_path / out

    many = ["sample.images_per_prompt=2", "sample.height=32", "sample.width=48"]
    wide = drawn("wide", *many, names=list(layouts))
    assert [size_of(wide / f"{number:05d}.png") for number in range(6)] == [(48, 32)] * 6
    shown = [pixels_of(wide / f"condition_{number:05d}.png") for number in range(3)]
    assert [(one.shape, bool((one < 255).any())) for one in shown] == [
        ((256, 256, 3), True), ((256, 256, 3), True), ((256, 256, 3), False),
    ]  # fmt: skip
    assert (wide / "sheet.png").exists()
    circle, square = (
        pixels_of(drawn(name, names=[name]) / "00000.png") for name in ("circle", "square")
    )
    assert circle.shape == (32, 32, 3)
    assert not np.array_equal(circle, square)  # of the same noise


def test_labels_that_the_model_does_not_know_are_refused_before_training(
    shop: Workshop, runs: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(shop, "scenes_layout", "conditioner.classes=[circle]", run=tmp_path)
    with pytest.raises(ValueError, match=r"conditioner\.classes lacks 'square', .* data\.latents"):
        fit(config)
    swapped = ["conditioner.classes=[square,circle]", f"train.max_steps={STEPS + 1}"]
    with pytest.raises(ValueError, match=r"conditioner\.classes"):  # not the run's numbers
        fit(config_of(shop, "scenes_layout", *swapped, run=runs["scenes_layout"]))


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        ("scenes_layout", [], r"^no conditions: .* sample\.boxes"),
        ("scenes_layout", ["sqare"], r"sample\.boxes: .*'sqare'.* did you mean 'square'\?"),
        ("scenes_layout", ["outside"], r"sample\.boxes: .* 'square' is outside of \[0, 1\]"),
        ("scenes_layout", ["flat"], r"sample\.boxes: .* 'square' has no area"),
        ("scenes_layout", ["image"], r"sample\.boxes: .*image\.png"),
        ("scenes_text", ["sqare"], r"sample\.boxes is not read"),
        ("emoji_super_resolution", [], r"^no conditions: .* sample\.images"),
        ("emoji_inpainting", ["images"], r"sample\.images names 1 files but sample\.masks names 0"),
        ("emoji_inpainting", ["images", "other"], r"sample\.masks: .* has 9x9 pixels"),
        ("emoji_inpainting", ["images", "black"], r"sample\.masks: .* is black"),
        ("scenes_semantic_map", ["images"], r"sample\.images is not read"),
        ("scenes_semantic_map", ["maps"], r"sample\.maps: .* has the class 7"),
        ("scenes_semantic_map", ["colours"], r"sample\.maps: .*"),
        ("emoji_super_resolution", ["nothing"], r"sample\.images: .*nothing"),
    ],
)
def test_wrong_files_are_named(
    experiment: str,
    options: list[str],
    message: str,
    shop: Workshop,
    runs: dict[str, Path],
    tmp_path: Path,
) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "image.png")
    Image.new("L", (9, 9), 255).save(tmp_path / "other.png")
    Image.new("L", (16, 16), 0).save(tmp_path / "black.png")
    Image.new("L", (16, 16), 7).save(tmp_path / "seven.png")
    wrong = {
        "sqare": ("sqare", [0, 0, 1, 1]),
        "outside": ("square", [0, 0, 1.1, 1]),
        "flat": ("square", [0.5, 0, 0.5, 1]),
    }
    for name, (label, box) in wrong.items():
        (tmp_path / name).write_text(json.dumps([{"label": label, "box": box}]))
    files = {
        **{name: ("boxes", name) for name in wrong},
        "image": ("boxes", "image.png"),
        "images": ("images", "image.png"),
        "other": ("masks", "other.png"),
        "black": ("masks", "black.png"),
        "maps": ("maps", "seven.png"),
        "colours": ("maps", "image.png"),
        "nothing": ("images", "nothing.png"),
    }
    named = [f"sample.{files[one][0]}=[{tmp_path / files[one][1]}]" for one in options]
    config = config_of(shop, experiment, *named, run=runs[experiment])
    with pytest.raises(ValueError, match=message):
        draw(config)


def test_evaluations_leave_the_training_as_it_is(
    shop: Workshop, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Training and sampling share the first stage and the conditioner of inpainting."""
    perceptual = "eval.perceptual_features=efficientnet_lite0"
    options = [f"train.max_steps={STEPS}", "eval.every=2", *MEASURE, perceptual]
    assert fit(config_of(shop, "emoji_inpainting", *options, run=tmp_path)) == 0
    assert losses(tmp_path) == losses(runs["emoji_inpainting"])


@pytest.mark.parametrize(
    ("experiment", "option"),
    [
        ("emoji_super_resolution", "sample.prompts=[a red circle]"),
        ("emoji_inpainting", "sample.init_image=other.png"),
        ("scenes_semantic_map", "sample.height=64"),
        ("scenes_layout", "sample.prompts_file=prompts.txt"),
    ],
)
def test_what_files_of_conditions_decide_is_not_asked_twice(
    experiment: str, option: str, shop: Workshop, runs: dict[str, Path]
) -> None:
    config = config_of(shop, experiment, option, run=runs[experiment])
    with pytest.raises(ValueError, match=rf"^{re.escape(option.split('=')[0])} is not read: "):
        draw(config)


def test_a_negative_prompt_is_of_captions(shop: Workshop, tmp_path: Path) -> None:
    options = ["sample.negative_prompt=blurred", "sampler.guidance_scale=3"]
    with pytest.raises(ValueError, match=r"^sample\.negative_prompt is of captions"):
        config_of(shop, "emoji_inpainting", *options, run=tmp_path)


def test_an_unconditional_model_needs_no_prompts(workshop: Workshop, tmp_path: Path) -> None:
    options = ["conditioner=none", "unet.context_dim=0", "train.max_steps=1"]
    options += ["sample.images_per_prompt=3", f"sample.out={tmp_path / 'drawn'}"]
    config = workshop.config("emoji", *options, run=tmp_path / "run")
    assert fit(config) == 0
    draw(config)
    assert len([*(tmp_path / "drawn").glob("0*.png")]) == 3


def test_each_kind_says_what_it_reads() -> None:
    reading = {kind: entry.reads for kind, entry in CONDITIONERS.items() if entry.reads}
    assert reading == {
        "super_resolution": ("store_images",),
        "inpainting": ("store_images",),
        "semantic_map": ("maps",),
        "layout": ("boxes",),
    }
