"""What `trainer.clip` says of its network, on pairs whose similarities are planted."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from data.shards.codecs import encode_png
from data.shards.manifest import Kind, Manifest
from data.shards.writer import ShardSetWriter
from models.conditioning.clip import Clip
from models.conditioning.clip_tokenizer import ClipTokenizer
from models.config import ConditionerConfig
from tests.support.paths import ROOT
from trainer.cli import load_config
from trainer.clip import job
from trainer.config import Config

SIDE = 8
PAIRS = 7
GREY_STEP = 30
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
IMAGES = np.array(
    [
        # an image's similarity to each caption; its own is on the diagonal
        [9, 0, 0, 0, 0, 0, 4],
        [0, 9, 0, 0, 0, 0, 4],
        [0, 0, 9, 0, 0, 0, 4],
        [0, 0, 0, 9, 0, 0, 4],
        [5, 0, 0, 0, 4, 0, 0],  # second best
        [5, 5, 5, 5, 0, 4, 0],  # fifth best
        [5, 5, 5, 5, 5, 0, 4],  # sixth best
    ],
    dtype=np.float64,
)
CAPTIONS = np.diag([1.0, 2, 3, 4, 5, 6, 70])
"""Embeddings of the captions; their lengths must not count."""


class PlantedClip:
    """Tells pictures by their grey and captions by their number."""

    visual = SimpleNamespace(image_size=SIDE)

    def encode_image(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (3, SIDE, SIDE)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        greys = 255 * (pixels * std + mean)
        numbers = (greys / GREY_STEP).round()
        torch.testing.assert_close(greys, numbers * GREY_STEP, atol=0.01, rtol=0)
        return torch.tensor(IMAGES)[numbers[:, 0, 0, 0].long()]

    def encode_text(self, numbers: Tensor) -> Tensor:
        return torch.tensor(CAPTIONS)[numbers]


class Numbers(ClipTokenizer):
    """Reads captions that are numbers."""

    @override
    def __call__(self, captions: list[str]) -> Tensor:
        return torch.tensor([int(caption) for caption in captions])


def planted(config: ConditionerConfig) -> Clip:
    assert load_file(config.pretrained)["weight"].dtype == torch.float16
    return Clip(
        model=PlantedClip(),
        tokenizer=Numbers(context_length=1),
        image_mean=MEAN,
        image_std=STD,
        text_architecture={},
        embed_dim=PAIRS,
    )


def trained(config: Config, folder: Path) -> dict[str, Tensor]:
    """Stands in for open_clip's trainer, of which only the input is seen here."""
    with (folder / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["title"] for row in rows] == [str(number) for number in range(PAIRS)]
    for number, row in enumerate(rows):
        with Image.open(row["filepath"]) as image:
            assert image.getpixel((0, 0)) == (GREY_STEP * number,) * 3
    return {"weight": torch.ones(2)}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Grey pictures, captioned by their numbers, for training and for validation."""
    for split in ("train", "val"):
        with ShardSetWriter(tmp_path / split, Kind.images, PAIRS) as writer:
            for number in range(PAIRS):
                grey = Image.new("RGB", (2 * SIDE, 2 * SIDE), (GREY_STEP * number,) * 3)
                writer.write({"png": encode_png(grey), "txt": str(number).encode()})
        Manifest(kind=Kind.images, shards=writer.shards).save(tmp_path / split)
    options = [f"data.dir={tmp_path}", f"data.image_size={2 * SIDE}"]
    return load_config(["+experiment=emoji", *options])


def test_the_recall_that_is_printed_and_kept_is_that_counted_by_hand(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "_run_open_clip", trained)
    monkeypatch.setattr(job, "load_clip", planted)
    job.train_clip(config)
    weights = Path(config.data.dir) / "clip.safetensors"
    kept = json.loads(weights.with_suffix(".figures.json").read_text())
    printed = capsys.readouterr().out.partition(f"wrote {weights}: ")[2]
    assert json.loads(printed) == kept
    assert kept["train"] == kept["val_images"] == PAIRS
    assert kept["recall_at_1"] == pytest.approx(4 / PAIRS)
    assert kept["recall_at_5"] == pytest.approx(6 / PAIRS)
    cosines = IMAGES / np.linalg.norm(IMAGES, axis=1, keepdims=True)
    own = np.diagonal(cosines)
    assert kept["cosine_matched"] == pytest.approx(own.mean())
    others = (cosines.sum() - own.sum()) / (PAIRS * (PAIRS - 1))
    assert kept["cosine_mismatched"] == pytest.approx(others)


@pytest.mark.parametrize("name", ["own.safetensors", "own.figures.json"])
def test_an_existing_file_is_never_overwritten(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(job, "_run_open_clip", lambda *_: pytest.fail("trained for nothing"))
    config.clip.out = str(tmp_path / "own.safetensors")
    (tmp_path / name).symlink_to(tmp_path / "lost")
    with pytest.raises(FileExistsError, match=rf"^clip\.out: .*{name} exists: delete it, or"):
        job.train_clip(config)


@pytest.mark.parametrize("experiment", ["emoji", "laion_512"])
def test_a_trained_clip_lies_with_the_data(experiment: str) -> None:
    config = load_config([f"+experiment={experiment}"])
    assert Path(config.clip.out).parent == Path(config.data.dir)
    assert ROOT / "conf" not in Path(config.clip.out).absolute().parents
