"""The commands in a row, as a user types them, on pictures with a few bad ones among them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Workshop, draw_pictures

ROOT = Path(__file__).parents[2]


def run(module: str, *words: str | Path, fails: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    if fails:
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
        return last
    return done.stdout


@pytest.fixture(scope="module")
def shop(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = Workshop(tmp_path_factory.mktemp("pipeline"))
    draw_pictures(shop.folder / "pictures")
    (shop.folder / "pictures" / "003.txt").unlink()
    (shop.folder / "pictures" / "007.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    shutil.copy(workshop.folder / "first_stage_4.safetensors", shop.folder)
    return shop


def test_from_pictures_to_a_report(shop: Workshop):
    folder = shop.folder / "run"
    options = [
        *shop.overrides("emoji", run=folder),
        "train.max_steps=4",
        "eval.every=2",
        "eval.features=[efficientnet_lite0]",
        "eval.clip_score=true",
        "eval.num_samples=8",
    ]
    packed = run("trainer.pack", *options)
    assert "rejected 1" in packed
    assert "nothing to do" in run("trainer.pack", *options).lower()
    listed = (shop.folder / "data" / "train" / "rejected.jsonl").read_text()
    listed += (shop.folder / "data" / "val" / "rejected.jsonl").read_text()
    assert "003.png" in listed
    assert "007.png" in listed

    first = run("trainer.precompute", *options)
    assert "data.latents:" in first
    assert "nothing to do" in run("trainer.precompute", *options)
    shard = sorted((shop.folder / "latents_4").glob("*.tar"))[1]
    before = shard.read_bytes()
    shard.unlink()
    assert "1 shards now" in run("trainer.precompute", *options)
    assert shard.read_bytes() == before

    trained = run("trainer", *options)
    assert "step 4/4" in trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line for line in lines if "eval/fd_efficientnet_lite0" in line}
    assert sorted(evaluated) == [0, 2, 4]
    assert evaluated[0]["eval/floor/fd_efficientnet_lite0"] > 0
    assert {"eval/clip_score", "eval/clip_score_shuffled", "eval/clip_score_stderr"} <= set(
        evaluated[4]
    )

    measured = run("trainer.evaluate", *options)
    assert "fd_efficientnet_lite0" in measured
    (numbers,) = (folder / "evaluations").glob("*.json")
    again = json.loads(numbers.read_text())
    assert again["fd_efficientnet_lite0"] == pytest.approx(
        evaluated[4]["eval/fd_efficientnet_lite0"], rel=1e-6
    )

    drawn = run("trainer.sample", *options, "sample.prompts=[a red circle,a blue square]")
    assert "2 images" in drawn
    with Image.open(folder / "samples" / "00000.png") as image:
        assert json.loads(image.info["parameters"])["prompt"] == "a red circle"
        assert image.size == (32, 32)

    report = run("trainer.report", folder)
    assert str(folder / "report.html") in report
    assert "Fréchet distance" in (folder / "report.html").read_text()


def test_missing_parts_name_the_path_and_the_command(shop: Workshop, tmp_path: Path):
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


def test_an_unknown_pretrained_tag_without_a_network(workshop: Workshop, tmp_path: Path):
    options = ["conditioner.model=ViT-B-32", "conditioner.pretrained=nothing"]
    line = run("trainer", *workshop.overrides("emoji", *options, run=tmp_path), fails=True)
    assert "conditioner.pretrained" in line
