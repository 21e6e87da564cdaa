"""The latent stream against webdataset, MosaicML streaming, litdata and a plain read of the files.

20,000 samples of 4×32×32 float16 moments, a caption and JSON, in 20 files of each format, all in
the page cache. One process without worker processes reads batches of 256, shuffled: a tensor of
the moments and the captions. Only webdataset parses the JSON.

Every reader has a process of its own, which is stopped while others have their turn: threads that
a reader leaves behind take no time from another. It goes on from where its last turn ended, so
opening files and filling buffers is timed for none. Rates are samples a second of processor time,
of all threads of its process, so whatever else the machine does weighs less; a ratio is
ours ÷ theirs, the median over the rounds.

Ours checks every byte against the manifest; the peers check nothing. The plain read copies the
shards into one buffer, which is used again and stays in the processor's cache.
"""

import importlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from webdataset.compat import WebDataset

from data.config import DataConfig
from data.order.batches import Share
from data.shards.codecs import encode_npy
from data.shards.manifest import Kind, LatentInfo, Manifest
from data.shards.writer import ShardSetWriter
from data.streams.latents import LatentStream

SAMPLES, SHARDS, BATCH = 20_000, 20, 256
SHAPE = (2, 4, 32, 32)
ROUNDS = 9
TURN_S = 1.0
READ_BYTES = 2**24

Batch = tuple[torch.Tensor, list[str]]


def main() -> None:
    """One line a reader, then the JSON."""
    for module, package in (("streaming", "mosaicml-streaming"), ("litdata", "litdata")):
        _peer(module, package)
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        _write_shards(Path(folder) / "ours")
        rates = _race(Path(folder))
    report: dict[str, float] = {}
    for name, theirs in rates.items():
        if name != "ours":
            ratios = [our / their for our, their in zip(rates["ours"], theirs, strict=True)]
            report[f"ratio_{name}"] = round(statistics.median(ratios), 3)
    for name, rate in rates.items():
        report[f"{name}_per_s"] = round(statistics.median(rate))
        print(f"{name:10} {report[f'{name}_per_s']:>9,} samples/s", end="")
        print(f"  ours is {report[f'ratio_{name}']:.2f}x" if name != "ours" else "")
    print(json.dumps(report))


def moments(number: int) -> np.ndarray:
    """The latents of a sample: [2, 4, 32, 32] float16."""
    return np.random.default_rng(number).standard_normal(SHAPE, np.float32).astype(np.float16)


def caption(number: int) -> str:
    """Its caption, which ends with the sample's number."""
    return f"a photograph of a small brown dog that runs over green grass, number {number}"


def metadata(number: int) -> bytes:
    """Its JSON."""
    return json.dumps({"width": 512, "height": 512, "number": number}).encode()


def _peer(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        sys.exit(f"{package}: {error}; run pip install -e '.[bench]'")


def _race(root: Path) -> dict[str, list[float]]:
    """Give every reader a turn a round: samples/s of each turn, by reader."""
    racers = {name: Racer(name, root) for name in READERS}
    try:
        rates: dict[str, list[float]] = {name: [] for name in racers}
        for _ in range(ROUNDS):
            for name, racer in racers.items():
                rates[name].append(racer.turn())
        return rates
    finally:
        for racer in racers.values():
            racer.end()


class Racer:
    """A reader in a process of its own, which stands still while it is not its turn."""

    def __init__(self, name: str, root: Path) -> None:
        """Start it, and wait until it has read an epoch."""
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_run, args=(name, root, theirs))
        self._process.start()
        theirs.close()
        self._await()

    def turn(self) -> float:
        """Let it read for TURN_S; return samples a second of its processor time."""
        self._signal(signal.SIGCONT)
        self._pipe.send(None)
        return self._await()

    def end(self) -> None:
        """End its process, threads included."""
        self._process.kill()
        self._process.join()

    def _await(self) -> float:
        rate: float = self._pipe.recv()
        self._signal(signal.SIGSTOP)
        return rate

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _run(name: str, root: Path, pipe: Connection) -> None:
    """Read in turns, as the parent asks for them, until it ends this process."""
    torch.set_num_threads(1)
    turn = READERS[name](root)
    pipe.send(0.0)
    while True:
        pipe.recv()
        samples, spent_s = turn()
        pipe.send(samples / spent_s)


def _turns(batches: Iterator[Batch]) -> Callable[[], tuple[int, float]]:
    """Check a reader's first epoch, and return what takes its next turn."""
    numbers = set()
    for _ in range(SAMPLES // BATCH):
        tensor, captions = next(batches)
        number = int(captions[-1].rpartition(" ")[2])
        numbers.update(captions)
        assert tensor.dtype == torch.float16 and tensor.shape == (BATCH, *SHAPE)
        assert captions[-1] == caption(number)
        assert np.array_equal(tensor[-1].numpy(), moments(number))
    assert len(numbers) > 0.9 * SAMPLES, "not the whole set"

    def turn() -> tuple[int, float]:
        start_s, samples = time.process_time(), 0
        while (spent_s := time.process_time() - start_s) < TURN_S:
            samples += len(next(batches)[1])
        return samples, spent_s

    return turn


def _read_raw(folder: Path) -> tuple[int, float]:
    buffer = bytearray(READ_BYTES)
    start_s, samples = time.process_time(), 0
    while (spent_s := time.process_time() - start_s) < TURN_S:
        for path in sorted(folder.glob("*.tar")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        samples += SAMPLES
    return samples, spent_s


def _write_shards(folder: Path) -> None:
    with ShardSetWriter(folder, Kind.latents, SAMPLES // SHARDS) as writer:
        for number in range(SAMPLES):
            writer.write(
                {
                    "moments.npy": encode_npy(moments(number)),
                    "txt": caption(number).encode(),
                    "json": metadata(number),
                }
            )
    info = LatentInfo(
        source_hash="",
        encoder="",
        transform="",
        shape=list(SHAPE[1:]),
        mean=[0.0] * SHAPE[1],
        std=[1.0] * SHAPE[1],
    )
    Manifest(kind=Kind.latents, shards=writer.shards, latents=info).save(folder)


def _read_ours(folder: Path) -> Iterator[Batch]:
    config = DataConfig(dir="", train="", val="", latents=str(folder), image_size=256)
    stream = LatentStream.open(config, Share(seed=0, global_batch=BATCH, micro_batch=BATCH))
    for (batch,) in stream.steps(0):
        yield batch.arrays["moments"], batch.captions


def _read_webdataset(folder: Path) -> Iterator[Batch]:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    dataset: Any = (
        WebDataset(shards, shardshuffle=SHARDS)
        .shuffle(1000)
        .decode()
        .to_tuple("moments.npy", "txt")
        .batched(BATCH, partial=False)
    )
    while True:
        for arrays, captions in dataset:
            yield torch.as_tensor(arrays), captions


def _read_mds(folder: Path) -> Iterator[Batch]:
    mds = _peer("streaming", "mosaicml-streaming")
    shape = ",".join(map(str, SHAPE))
    columns = {"moments": f"ndarray:float16:{shape}", "caption": "str", "json": "bytes"}
    size_limit = SAMPLES // SHARDS * 17_000
    with mds.MDSWriter(out=str(folder), columns=columns, size_limit=size_limit) as writer:
        for number in range(SAMPLES):
            sample = {"moments": moments(number), "caption": caption(number)}
            writer.write(sample | {"json": metadata(number)})
    dataset = mds.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True)
    while True:
        for batch in loader:
            yield batch["moments"], batch["caption"]


def _litdata_sample(number: int) -> dict[str, Any]:
    tensor = torch.from_numpy(moments(number))
    return {"moments": tensor, "caption": caption(number), "json": metadata(number).decode()}


def _read_litdata(folder: Path) -> Iterator[Batch]:
    litdata = _peer("litdata", "litdata")
    litdata.optimize(
        fn=_litdata_sample,
        inputs=list(range(SAMPLES)),
        output_dir=str(folder),
        chunk_size=SAMPLES // SHARDS,
        num_workers=1,
    )
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True)
    while True:
        for batch in loader:
            yield batch["moments"], batch["caption"]


Turn = Callable[[], tuple[int, float]]
READERS: dict[str, Callable[[Path], Turn]] = {
    "ours": lambda root: _turns(_read_ours(root / "ours")),
    "webdataset": lambda root: _turns(_read_webdataset(root / "ours")),
    "mds": lambda root: _turns(_read_mds(root / "mds")),
    "litdata": lambda root: _turns(_read_litdata(root / "litdata")),
    "raw": lambda root: lambda: _read_raw(root / "ours"),
}
"""Name → what writes its files, checks an epoch, and returns its turns: (samples, seconds)."""

if __name__ == "__main__":
    main()
