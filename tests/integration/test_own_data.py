"""Every command of docs/own_data.md, in the order of the page, on small sets of each kind."""

import io
import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from shutil import make_archive

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from data.shards.manifest import Manifest
from tests.support.packing import img2dataset
from tests.support.paths import ROOT
from tests.support.processes import Command
from tests.support.s3_server import KEY, SECRET, S3Server
from tests.support.workshop import NETWORKS, Workshop, draw_pictures
from trainer.cli import load_config

PAGE = (ROOT / "docs" / "own_data.md").read_text()
PYTHON = ".venv/bin/python -m "
SMALL = [
    *NETWORKS,
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "precompute.workers=0",
    "sampler.steps=2",
    "logger.wandb.mode=disabled",
]


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of each kind, under the names of the page."""
    folder = tmp_path_factory.mktemp("own")
    draw_pictures(folder / "my_pictures")
    texts = {path.stem: path.read_text() for path in (folder / "my_pictures").glob("*.txt")}
    lines = ["file_name,text", *(f"{stem}.png,{text}" for stem, text in sorted(texts.items()))]
    (folder / "my_pictures" / "metadata.csv").write_text("\n".join(lines))
    for stem, text in texts.items():
        (folder / "my_pictures" / f"{stem}.txt").unlink()
        place = folder / "my_classes" / text.split()[-1] / f"{stem}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((folder / "my_pictures" / f"{stem}.png").read_bytes())
    make_archive(str(folder / "my_pictures"), "zip", folder / "my_pictures")
    img2dataset(folder / "my_download")
    images = [path.read_bytes() for path in sorted((folder / "my_pictures").glob("*.png"))]
    (folder / "my_dataset").mkdir()
    table = {"image": [{"bytes": image, "path": None} for image in images], "text": ["x"] * 48}
    parquet.write_table(pa.table(table), folder / "my_dataset" / "train-00000.parquet")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that leads to a store with tars."""
    home = tmp_path_factory.mktemp("store")
    (home / "my-bucket" / "tars").mkdir(parents=True)
    with tarfile.open(home / "my-bucket" / "tars" / "0.tar", "w") as tar:
        for number in range(12):
            pixels = np.full((40, 40, 3), 20 * number, np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            for name, payload in (("png", buffer.getvalue()), ("txt", b"a grey square")):
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    server = S3Server(home)
    server.start()
    yield {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
    }
    server.stop()


def adapted(command: str, places: Path, workshop: Workshop) -> list[str]:
    """The words of a command, sent to the small sets."""
    words = shlex.split(command.removeprefix(PYTHON))
    for name in ("my_pictures", "my_classes", "my_download", "my_dataset"):
        words = [word.replace(f"path={name}", f"path={places / name}") for word in words]
    words = [word for word in words if not word.startswith("train.max_steps=")]
    own = [word.partition("=")[2] for word in words if word.startswith("data.dir=")]
    words = [word for word in words if not word.startswith("data.dir=")]
    run = next((word for word in words if word.startswith("+experiment=")), "").partition("=")[2]
    if "emoji_autoencoder" not in command:
        words.append(f"autoencoder.weights={workshop.folder / 'first_stage_4.safetensors'}")
    return [
        *words,
        *SMALL,
        f"data.dir={places / 'data' / (own[0] if own else 'own')}",
        f"run.dir={places / 'runs' / run}",
        f"sample.out={places / 'drawn'}",
        "train.max_steps=2",
    ]


SAYS = {
    "pack.propose=true": "# @package _global_",
    "pack.dry_run=true": "samples: ",
    "trainer.pack": "0 rejected",
    "trainer.precompute": "images/s",
    "trainer.sample": "1 images in ",
    "+experiment=emoji_autoencoder": "weights for autoencoder.weights: ",
    "trainer +experiment=emoji": "trained: ",
}
"""Part of a command → a part of its output; the first that is found in a command counts."""


def test_every_command_of_the_page_runs_in_its_order(
    places: Path, workshop: Workshop, store: dict[str, str]
) -> None:
    shown = commands()
    assert len(shown) == 12
    for command in shown:
        module, *words = adapted(command, places, workshop)
        ended = Command(module, words, environment=store).finish(timeout_s=300)
        assert ended.code == 0, f"{command}\n{ended.said}"
        part = next(part for part in SAYS if part in command)
        assert SAYS[part] in ended.said, f"{command}\n{ended.said}"
    with Image.open(places / "drawn" / "00000.png") as picture:
        assert picture.size == (32, 32)
    packed = places / "data" / "datasets" / "classes" / "train"
    assert Manifest.load(packed, option="data.train").classes == ["circle", "square"]


def test_the_experiment_of_the_page_is_short_and_complete(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(text.splitlines()) <= 15
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(text)
    config = load_config(["+experiment=own", f"hydra.searchpath=[file://{tmp_path}]"])
    assert (config.run.experiment, config.run.name) == ("own", "first")
    assert (config.data.source.path, config.train.max_steps) == ("my_pictures", 20_000)
