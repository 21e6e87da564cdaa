"""Packing a folder of photographs beside img2dataset: `python -m tests.benchmarks.pack PEER`.

PEER: img2dataset's command, which has an environment of its own (`make bench` makes it). It reads
the same files by `file://` addresses, and scales them to 256 px, which packing leaves to training.
It has two processes, packing has one, and they take turns. The last line is JSON, of the best round
of each:

- `images_per_cpu_s`, `peer_images_per_cpu_s`: images for each second of processor time.
- `images_per_s`, `peer_images_per_s`: images for each second of wall time, the start included.
- `ratio_cpu`, `ratio_wall`: ours ÷ theirs.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PICTURES, SIDES, ROUNDS = 1000, (1024, 768), 3
"""Those of LAION are about as large; fewer would measure the start of both programs."""


def main() -> None:
    (peer,) = sys.argv[1:]
    ours, theirs = list[tuple[float, float]](), list[tuple[float, float]]()
    with tempfile.TemporaryDirectory(prefix="pack-") as name:
        folder = Path(name)
        write_pictures(folder / "raw")
        for number in range(ROUNDS):
            ours.append(seconds(pack(folder / "raw", folder / f"ours_{number}")))
            theirs.append(seconds(download(peer, folder, folder / f"theirs_{number}")))
        packed = json.loads((folder / "ours_0" / "train" / "manifest.json").read_text())
        assert sum(shard["samples"] for shard in packed["shards"]) == PICTURES
        (stats,) = (folder / "theirs_0").glob("*_stats.json")
        assert json.loads(stats.read_text())["successes"] == PICTURES
    (cpu_s, wall_s), (peer_cpu_s, peer_wall_s) = (
        map(min, zip(*all_, strict=True)) for all_ in (ours, theirs)
    )
    result = {
        "images_per_cpu_s": round(PICTURES / cpu_s),
        "peer_images_per_cpu_s": round(PICTURES / peer_cpu_s),
        "images_per_s": round(PICTURES / wall_s),
        "peer_images_per_s": round(PICTURES / peer_wall_s),
        "ratio_cpu": round(peer_cpu_s / cpu_s, 2),
        "ratio_wall": round(peer_wall_s / wall_s, 2),
    }
    print(json.dumps(result))


def write_pictures(folder: Path) -> None:
    """Write photographs of clouds, captions beside them, and the list that img2dataset reads."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    rows: list[dict[str, str]] = []
    for number in range(PICTURES):
        coarse = Image.fromarray(draws.integers(0, 256, (48, 64, 3), np.uint8))
        path = folder / f"{number:05}.jpg"
        coarse.resize(SIDES, Image.Resampling.BICUBIC).save(path, quality=90)
        caption = f"a photograph of a cloud, number {number}"
        path.with_suffix(".txt").write_text(caption)
        rows.append({"url": path.as_uri(), "caption": caption})
    pq.write_table(pa.Table.from_pylist(rows), folder.parent / "list.parquet")


def pack(raw: Path, target: Path) -> list[str]:
    words = ["+experiment=own_256", f"data.source.path={raw}", f"data.dir={target}"]
    return [
        sys.executable,
        "-m",
        "trainer.pack",
        *words,
        "data.source.val_share=0",
    ]


def download(peer: str, folder: Path, target: Path) -> list[str]:
    options = {
        "url_list": folder / "list.parquet",
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": target,
        "image_size": 256,
        "resize_mode": "center_crop",
        "processes_count": 2,
        "thread_count": 8,
    }
    return [peer, *(f"--{key}={value}" for key, value in options.items())]


def seconds(command: list[str]) -> tuple[float, float]:
    """Run a command; return its processor time, with that of its processes, and its wall time."""
    before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, time.monotonic() - start_s


if __name__ == "__main__":
    main()
