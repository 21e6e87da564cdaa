"""What it costs to register existing tars: `python -m tests.benchmarks.registering`.

Tars of 1,000 samples, each with a picture of 8 KiB, a caption and JSON, in the page cache.
Registering reads every byte, writes an index with a CRC-32 of each member, and a receipt. Beside
it, in turns, in one process: reading the headers alone, one `pread` each, and reading every byte
with its CRC-32. The last line is JSON; times are processor time, the least of the rounds:

- `registered_per_s`, `headers_per_s`, `bytes_per_s`: samples a second of each.
- `ratio_headers`, `ratio_bytes`: registering ÷ the other.
- `growth_mb`: growth of the process's peak over the last half of the registered tars.
"""

import io
import json
import os
import resource
import tarfile
import tempfile
import zlib
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from data.shards.register import Part, Selection, Tar, register_tar
from tests.benchmarks.turns import least_seconds

TARS, SAMPLES, PICTURE_BYTES, ROUNDS = 12, 1000, 8192, 5
MANY = 60
BLOCK = 512
"""Bytes of a header; payloads are padded to whole blocks."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="registering-") as folder:
        names = [write_tar(Path(folder), number) for number in range(TARS)]
        tars = [Path(folder) / name for name in names]
        registered, headers, everything = least_seconds(
            partial(register, Path(folder), names, count()),
            lambda: [read_headers(tar) for tar in tars],
            lambda: [read_bytes(tar) for tar in tars],
            rounds=ROUNDS,
        )
        growth = growth_mb(Path(folder), names)
    samples = TARS * SAMPLES
    result = {
        "registered_per_s": round(samples / registered),
        "headers_per_s": round(samples / headers),
        "bytes_per_s": round(samples / everything),
        "ratio_headers": round(headers / registered, 3),
        "ratio_bytes": round(everything / registered, 3),
        "growth_mb": round(growth, 1),
    }
    print(json.dumps(result))


def write_tar(folder: Path, number: int) -> str:
    name = f"{number:05}.tar"
    draws = np.random.default_rng(number)
    with tarfile.open(folder / name, "w") as tar:
        for sample in range(SAMPLES):
            members = {
                "jpg": draws.bytes(PICTURE_BYTES),
                "txt": f"a photograph of a small brown dog, number {sample}".encode(),
                "json": json.dumps({"width": 512, "height": 512, "number": sample}).encode(),
            }
            for extension, payload in members.items():
                info = tarfile.TarInfo(f"{number * SAMPLES + sample:09}.{extension}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return name


def register(folder: Path, names: list[str], rounds: "count[int]") -> None:
    """Register all tars into a folder of this round, so that no receipt spares the work."""
    target = folder / f"set_{next(rounds)}"
    selection = Selection([Part(target)])
    for name in names:
        (one,) = register_tar(Tar(base=str(folder), name=name, state=""), selection)
        assert one.shard.samples == SAMPLES


def read_headers(tar: Path) -> None:
    file = os.open(tar, os.O_RDONLY)
    place = 0
    while (header := os.pread(file, BLOCK, place))[:1].strip(b"\0"):
        size = int(header[124:135], 8)
        place += BLOCK + -(-size // BLOCK) * BLOCK
    os.close(file)


def read_bytes(tar: Path) -> None:
    zlib.crc32(tar.read_bytes())


def growth_mb(folder: Path, names: list[str]) -> float:
    """Register MANY tars; return the growth of the peak over the last half."""
    selection, peaks = Selection([Part(folder / "many")]), list[int]()
    for number in range(MANY):
        tar = Tar(base=str(folder), name=names[number % len(names)], state=str(number))
        register_tar(tar, selection)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (peaks[-1] - peaks[MANY // 2]) / 1024


if __name__ == "__main__":
    main()
