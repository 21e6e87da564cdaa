"""The commands in a row, as a user types them, on pictures with a few bad ones among them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.processes import run_command
from tests.support.workshop import Workshop, draw_pictures


def run(module: str, *words: str | Path, fails: bool = False) -> str:
    done = run_command(module, *words)
    assert (done.code != 0) == fails, done.said
    if fails:
        last = done.err.strip().splitlines()[-1]
        assert last.startswith("error: "), done.err
        assert "Traceback" not in done.err
        return last
    return done.out


@pytest.fixture(scope="module")
def shop(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = Workshop(tmp_path_factory.mktemp("pipeline"))
    draw_pictures(shop.folder / "pictures")
    (shop.folder / "pictures" / "003.txt").unlink()
    (shop.folder / "pictures" / "007.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    shutil.copy(workshop.folder / "first_stage_4.safetensors", shop.folder)
    return shop


@dataclass(frozen=True)
class Trained:
    """A run from pictures to a checkpoint, with what the commands printed."""

    folder: Path
    options: list[str]
    printed: dict[str, str]

    @property
    def evaluations(self) -> dict[int, dict[str, Any]]:
        """The lines of metrics.jsonl with an evaluation, by step."""
        found = (self.folder / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in found]
        return {line["step"]: line for line in lines if "eval/fd_efficientnet_lite0" in line}


@pytest.fixture(scope="module")
def trained(shop: Workshop) -> Trained:
    """What pack, precompute and the training make of the pictures."""
    folder = shop.folder / "run"
    options = [
        *shop.overrides("emoji", run=folder),
        "train.max_steps=4",
        "eval.every=2",
        "eval.features=[efficientnet_lite0]",
        "eval.clip_score=true",
        "eval.num_samples=8",
    ]
    commands = ("trainer.pack", "trainer.precompute", "trainer")
    return Trained(folder, options, {command: run(command, *options) for command in commands})


def test_bad_pictures_are_listed_and_what_is_packed_is_not_packed_again(
    shop: Workshop, trained: Trained
) -> None:
    assert "rejected 1" in trained.printed["trainer.pack"]
    assert "nothing to do" in run("trainer.pack", *trained.options).lower()
    folder = shop.folder / "data"
    listed = "".join(path.read_text() for path in folder.glob("*/rejected.jsonl"))
    assert "003.png" in listed
    assert "007.png" in listed


def test_only_a_lost_shard_of_latents_is_made_again(shop: Workshop, trained: Trained) -> None:
    assert "data.latents:" in trained.printed["trainer.precompute"]
    assert "nothing to do" in run("trainer.precompute", *trained.options)
    shard = sorted((shop.folder / "latents_4").glob("*.tar"))[1]
    before = shard.read_bytes()
    shard.unlink()
    assert "1 shards now" in run("trainer.precompute", *trained.options)
    assert shard.read_bytes() == before


def test_a_training_is_measured_as_its_checkpoint_is_measured_later(trained: Trained) -> None:
    assert "step 4/4" in trained.printed["trainer"]
    evaluated = trained.evaluations
    assert sorted(evaluated) == [0, 2, 4]
    assert evaluated[0]["eval/floor/fd_efficientnet_lite0"] > 0
    scores = {"eval/clip_score", "eval/clip_score_shuffled", "eval/clip_score_stderr"}
    assert scores <= set(evaluated[4])
    assert "fd_efficientnet_lite0" in run("trainer.evaluate", *trained.options)
    (numbers,) = (trained.folder / "evaluations").glob("*.json")
    again = json.loads(numbers.read_text())["fd_efficientnet_lite0"]
    assert again == pytest.approx(evaluated[4]["eval/fd_efficientnet_lite0"], rel=1e-6)


def test_a_checkpoint_draws_samples_of_the_prompts(trained: Trained) -> None:
    prompts = "sample.prompts=[a red circle,a blue square]"
    assert "2 images" in run("trainer.sample", *trained.options, prompts)
    (drawn,) = (trained.folder / "samples").glob("*/00000.png")
    with Image.open(drawn) as image:
        assert json.loads(image.info["parameters"])["prompt"] == "a red circle"
        assert image.size == (32, 32)


def test_a_run_folder_becomes_a_page(trained: Trained) -> None:
    page = trained.folder / "report.html"
    assert str(page) in run("trainer.report", trained.folder)
    assert "Fréchet distance" in page.read_text()


def test_missing_parts_name_the_path_and_the_command(shop: Workshop, tmp_path: Path) -> None:
    away = [f"data.dir={tmp_path / 'data'}", f"data.latents={tmp_path / 'latents'}"]
    options = shop.overrides("emoji", *away, run=tmp_path / "run")
    wanted = "python -m trainer.precompute +experiment=emoji"
    line = run("trainer", *options, fails=True)
    assert line.startswith("error: data.latents: ")
    assert wanted in line
    line = run("trainer.precompute", *options, fails=True)
    assert "data.train" in line
    assert "python -m trainer.pack +experiment=emoji" in line
    line = run("trainer.evaluate", *options, fails=True)
    assert "checkpoint.load" in line
    line = run("trainer.pack", *options, f"data.source.path={tmp_path / 'none'}", fails=True)
    assert "data.source.path" in line


def test_an_unknown_pretrained_tag_without_a_network(workshop: Workshop, tmp_path: Path) -> None:
    options = ["conditioner.model=ViT-B-32", "conditioner.pretrained=nothing"]
    line = run("trainer", *workshop.overrides("emoji", *options, run=tmp_path), fails=True)
    assert "conditioner.pretrained" in line
