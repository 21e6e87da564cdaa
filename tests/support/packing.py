"""Sources and packed sets, for tests of packing."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from data.config import DataConfig, FilterConfig, SourceConfig, SourceKind
from data.order.batches import Share
from data.shards.manifest import Manifest
from data.shards.reader import ShardReader
from data.streams.images import ImageStream
from tests.support.data_sets import data_config, png
from trainer.cli import load_config
from trainer.pack.job import pack

config = load_config(["+experiment=emoji_autoencoder", "pack.max_rejected=1"])


def run(data: DataConfig, **limits: Any) -> None:
    """Pack; limits: options of `pack`. Without any, all samples but one may be lost."""
    limited = dataclasses.replace(config.pack, **limits)
    pack(dataclasses.replace(config, data=data, pack=limited))


def folder_config(tmp_path: Path, samples: int = 30, **source: Any) -> DataConfig:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(samples):
        (raw / f"{number:02d}.png").write_bytes(png(number))
        (raw / f"{number:02d}.txt").write_text(f"caption {number}")
    options: dict[str, Any] = {"path": str(raw), "shard_samples": 10, "val_share": 0.2}
    return data_config(tmp_path, source=SourceConfig(**(options | source)))


def contents(folder: str) -> list[tuple[bytes, str, dict[str, Any]]]:
    manifest = Manifest.load(folder, option="data.train")
    return [
        (
            bytes(stored.payload("png")),
            str(stored.payload("txt"), "utf-8"),
            json.loads(bytes(stored.payload("json"))),
        )
        for stored in ShardReader(folder, manifest).find(np.arange(manifest.samples))
    ]


def snapshot(folder: str) -> dict[str, tuple[int, bytes]]:
    return {
        file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in Path(folder).iterdir()
    }


def foreign_tars(folder: Path, tars: int = 4) -> None:
    """Shards as another tool makes them: GNU format, extra members, one sample uncaptioned."""
    folder.mkdir(parents=True)
    for number in range(tars):
        for row in range(5):
            stem = folder / f"{number}{row:03d}"
            stem.with_suffix(".png").write_bytes(png(10 * number + row))
            stem.with_suffix(".txt").write_text(f"caption {number} {row}")
            stem.with_suffix(".exe").write_text("never read")
        if number == 1:
            (folder / "1002.txt").unlink()
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for file in sorted(folder.glob(f"{number}[0-9][0-9][0-9].*")):
                tar.add(file, file.name)
                file.unlink()


def img2dataset(folder: Path, tars: int = 3, rows: int = 8) -> None:
    """What img2dataset writes: for each tar a parquet with failures, too, and counts."""
    folder.mkdir()
    for number in range(tars):
        table = []
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in range(rows):
                key = f"{number:05d}{row:04d}"
                caption = f"caption {number} {row}" + " and more" * row
                facts = {"key": key, "caption": caption, "width": 8, "height": 8, "similarity": row}
                fetched = row != 5
                table.append(
                    {
                        **facts,
                        "status": "success" if fetched else "failed_to_download",
                        "original_width": 100 * row,
                        "AESTHETIC_SCORE": None if row == 2 else row / 2,
                        "LANGUAGE": "en" if row % 2 else "de",
                    }
                )
                members = {"png": png(100 * number + row), "txt": caption.encode()}
                members["json"] = json.dumps(facts).encode()
                for extension, payload in members.items() if fetched else ():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
        parquet.write_table(pa.Table.from_pylist(table), folder / f"{number:05d}.parquet")
        counts = {"count": rows, "successes": rows - 1, "failed_to_download": 1}
        counts |= {"failed_to_resize": 0, "duration": 1.5, "status_dict": {"success": rows - 1}}
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(counts))


def webdataset(tmp_path: Path, path: str, *rules: FilterConfig, **source: Any) -> DataConfig:
    options = SourceConfig(kind=SourceKind.webdataset, path=path, **source)
    return data_config(tmp_path, source=options, filters=list(rules), max_rejected_share=1.0)


def read_captions(data: DataConfig) -> list[str]:
    stream = ImageStream.open(data, "train", Share(seed=0, global_batch=4, micro_batch=4))
    return stream.read(np.arange(stream.num_samples)).captions
