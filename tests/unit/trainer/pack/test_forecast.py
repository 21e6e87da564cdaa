"""What packing says before the job: sizes, samples, bytes, and an experiment that fits."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from data.config import FilterConfig, Missing, SourceConfig, SourceKind
from data.shards.codecs import image_size
from data.shards.manifest import Manifest
from models.config import ConditionerKind
from tests.support.data_sets import png
from tests.support.packing import img2dataset
from tests.support.workshop import draw_pictures
from trainer.cli import load_config
from trainer.config import Config
from trainer.pack.forecast import forecast_shards, forecast_tars
from trainer.pack.job import pack
from trainer.pack.proposal import find_kind, propose
from trainer.pack.sizes import enlargements, lost_shares, size_lines
from trainer.precompute.job import precompute


def config_of(folder: Path, source: SourceConfig, **pack_options: Any) -> Config:
    config = load_config(["+experiment=emoji", f"data.dir={folder}/out", "pack.max_rejected=1"])
    return replace(
        config,
        data=replace(config.data, source=source),
        pack=replace(config.pack, **pack_options),
    )


def folder_set(folder: Path) -> SourceConfig:
    draws = np.random.default_rng(0)
    folder.mkdir()
    for number in range(120):
        side = int(draws.integers(20, 90))
        pixels = draws.integers(0, 255, (side, side + 10, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        if number % 6:
            (folder / f"{number:03d}.txt").write_text("caption " * (number % 7))
    return SourceConfig(path=str(folder), val_share=0.1, shard_samples=40)


def table_set(folder: Path) -> SourceConfig:
    folder.mkdir()
    images = [{"bytes": png(number, size=8 + number % 30), "path": None} for number in range(150)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part in range(3):
        table = {"image": pa.array(images[part::3], kind), "text": ["a caption"] * 50}
        parquet.write_table(pa.table(table), folder / f"{part}.parquet")
    return SourceConfig(kind=SourceKind.image_tables, path=str(folder), val_share=0.1)


def tar_set(folder: Path) -> SourceConfig:
    img2dataset(folder, tars=6, rows=40)
    return SourceConfig(kind=SourceKind.webdataset, path=str(folder))


@pytest.mark.parametrize("make", [folder_set, table_set, tar_set])
def test_the_forecast_is_within_a_tenth_of_what_comes(make: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path, make(tmp_path / "source"))
    of_tars = config.data.source.kind is SourceKind.webdataset
    found = forecast_tars(config) if of_tars else forecast_shards(config)
    assert not (tmp_path / "out").exists()
    pack(config)
    manifests = [
        Manifest.load(folder, option="data")
        for folder in (config.data.train, config.data.val)
        if (Path(folder) / "manifest.json").exists()
    ]
    samples = sum(manifest.samples for manifest in manifests)
    size_bytes = sum(manifest.size_bytes for manifest in manifests)
    real = {"samples": samples} | ({} if of_tars else {"bytes": size_bytes})
    predicted = {"samples": found.samples, "bytes": found.shard_bytes}
    print(json.dumps({"predicted": predicted, "real": real}))
    for name, value in real.items():
        assert predicted[name] == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("make", [folder_set, tar_set])
def test_latents_are_within_a_tenth_of_the_forecast(
    make: Any, images: bool, tmp_path: Path
) -> None:
    config = config_of(tmp_path, make(tmp_path / "source"))
    config = replace(config, data=replace(config.data, store_images=images))
    of_tars = config.data.source.kind is SourceKind.webdataset
    found = forecast_tars(config) if of_tars else forecast_shards(config)
    pack(config)
    precompute(config)
    folder = Path(config.data.latents)
    real = sum(one.stat().st_size for one in folder.glob("*.tar*") if "receipt" not in one.name)
    print(json.dumps({"predicted": found.latent_bytes, "real": real}))
    assert found.latent_bytes == pytest.approx(real, rel=0.1)


def test_a_dry_run_prints_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(config_of(tmp_path, folder_set(tmp_path / "source"), dry_run=True))
    said = capsys.readouterr().out
    assert re.search(r"^samples:  \d+ in \d+ shards$", said, re.MULTILINE)
    assert re.search(r"^latents:  0\.\d{3} GiB", said, re.MULTILINE)
    assert "cropped away" in said
    assert not (tmp_path / "out").exists()


def test_what_the_crop_takes_and_what_is_enlarged() -> None:
    sides = [(100, 100), (200, 100), (50, 100), (400, 100)]
    assert lost_shares(sides).tolist() == [0, 0.5, 0.5, 0.75]
    assert enlargements(sides, 100).tolist() == [1, 1, 2, 1]
    lines = list(size_lines(sides, 100))
    assert lines[0] == "cropped to 100 px, 4 pictures:"
    assert "43.8% of their pixels on average, up to 75.0%" in lines[1]
    assert [" ".join(line.split()[:-1]) for line in lines[2:5]] == [
        "nothing 25.0%",
        "up to 50% 50.0%",
        "up to 100% 25.0%",
    ]
    assert "enlarged beyond 1.0x: 25.0% of them, up to 2.00x" in lines[5]
    assert [" ".join(line.split()[:-1]) for line in lines[6:]] == ["not 75.0%", "up to 2x 25.0%"]


@pytest.mark.parametrize(
    ("options", "kept"), [({"min_side": 60}, 60), ({"max_enlarge": 2.0}, 32), ({}, 20)]
)
def test_small_pictures_are_left_out(tmp_path: Path, options: dict[str, Any], kept: int) -> None:
    source = folder_set(tmp_path / "source")
    config = config_of(tmp_path, replace(source, require_captions=False), **options)
    pack(config)
    train = Manifest.load(config.data.train, option="data.train")
    val = Manifest.load(config.data.val, option="data.val")
    files = (tmp_path / "source").glob("*.png")
    sides = [image_size(path.read_bytes())[1] for path in files]
    assert train.samples + val.samples == sum(side >= kept for side in sides)
    assert [count.rule for count in train.filters] == ([f"short_side >= {kept}"] if options else [])


def test_a_filter_that_drops_all_or_nothing_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, folder_set(tmp_path / "source"))
    config.data.filters = [FilterConfig(name="widht", max=5, missing=Missing.keep)]
    pack(config)
    assert "warning: filter widht <= 5 or missing drops nothing" in capsys.readouterr().out
    config = config_of(tmp_path / "all", config.data.source)
    config.data.filters = [FilterConfig(name="widht", max=5)]
    with pytest.raises(ValueError, match=r"nothing usable .*widht <= 5"):
        pack(config)


def proposed(config: Config) -> dict[str, str]:
    lines = [line.text.strip() for line in propose(config)]
    return dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith("-"))


def test_a_proposal_fits_its_source_and_runs(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "labels.csv").write_text("file_name,text\n")
    config = config_of(tmp_path, SourceConfig(path=str(tmp_path / "pictures")))
    found = proposed(config)
    assert found["# left alone 1"].startswith(".csv: of tables, captions.csv")
    assert (found["kind"], found["image_size"]) == ("folder", "32")
    written = tmp_path / "conf" / "experiment" / "own.yaml"
    written.parent.mkdir(parents=True)
    written.write_text("\n".join(line.text for line in propose(config)))
    own = load_config(["+experiment=own", f"hydra.searchpath=[file://{tmp_path}/conf]"])
    assert own.data.source.path == str(tmp_path / "pictures")
    assert own.conditioner.kind is ConditionerKind.text
    assert own.run.experiment == "own"


def classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(png(0))


def tables(folder: Path) -> None:
    table_set(folder)


def tars(folder: Path) -> None:
    img2dataset(folder)


def pictures(folder: Path) -> None:
    draw_pictures(folder)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (classes, SourceKind.class_folders),
        (tables, SourceKind.image_tables),
        (tars, SourceKind.webdataset),
        (pictures, SourceKind.folder),
    ],
)
def test_the_kind_of_a_source_is_found(tmp_path: Path, make: Any, kind: SourceKind) -> None:
    make(tmp_path / "source")
    assert find_kind(str(tmp_path / "source"))[0] is kind
    assert find_kind("s3://bucket/{000..099}.tar")[0] is SourceKind.webdataset
    with pytest.raises(FileNotFoundError, match=r"data\.source\.path: nothing at"):
        find_kind(str(tmp_path / "gone"))
