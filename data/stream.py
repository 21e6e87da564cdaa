"""The samples of a data set as batches: in the plan's order to train on, or by number."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from data import read_ahead
from data.cache import Prefetcher
from data.captions import choose_caption
from data.codecs import BadSampleError
from data.config import DataConfig
from data.cursor import VERSION, Cursor
from data.manifest import Kind, Manifest, ManifestError, Rejected
from data.mixture import MixturePlan
from data.plan import Ids, LanePlan
from data.quarantine import Quarantine
from data.reader import ShardReader
from data.stored import StoredBatch, StoredSample

Flips = Callable[[Ids, Ids], np.ndarray]
"""(epoch [B], index [B]) → [B] bool: whether each visit is mirrored."""
Draws = Callable[[Ids, Ids], np.ndarray]
"""(epoch [B], index [B]) → [B] from [0, 1): which of its captions each visit takes."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """A micro batch."""

    epoch: Ids
    """[B], which visit of the sample this is."""
    index: Ids
    """[B], the place in the manifest's order that randomness is drawn for."""
    keys: list[str]
    """Keys of the samples delivered: not those of `index` where a substitute stands in."""
    captions: list[str]
    arrays: dict[str, torch.Tensor]
    """images: [B, 3, S, S] float32 in [-1, 1]; moments: [B, 2, C, h, w] and text: [B, T, D]
    float16, as stored."""


class Visits(NamedTuple):
    """How samples are seen this time."""

    flip: np.ndarray
    """[B] bool: mirrored."""
    draw: np.ndarray
    """[B] from [0, 1): which of its captions each has."""

    def part(self, rows: slice) -> "Visits":
        """Return some of them."""
        return Visits(self.flip[rows], self.draw[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A micro batch to read; `place` is that of its first sample in the global batch."""

    step: int
    place: int
    epoch: Ids
    index: Ids
    visits: Visits


@dataclass(slots=True, kw_only=True)
class Rows:
    """Samples side by side; what stands in a bad one's row means nothing."""

    keys: list[str]
    captions: list[str]
    arrays: dict[str, np.ndarray]
    """As stored: [B, ...]."""
    bad: dict[int, Rejected]
    """By row."""

    def reject(self, row: int, stored: StoredSample, error: BadSampleError) -> None:
        """Say why a row means nothing."""
        self.bad[row] = Rejected(key=stored.key, reason=str(error), shard=stored.shard.name)

    def take(self, rows: list[int]) -> "Rows":
        """Return some of the rows, all good."""
        return Rows(
            keys=[self.keys[row] for row in rows],
            captions=[self.captions[row] for row in rows],
            arrays={name: array[rows] for name, array in self.arrays.items()},
            bad={},
        )

    def replace(self, row: int, other: "Rows") -> None:
        """Put the only sample of `other` into a row."""
        self.keys[row], self.captions[row] = other.keys[0], other.captions[0]
        for name, array in self.arrays.items():
            array[row] = other.arrays[name][0]


Result = tuple[Batch, list[Rejected]]


def shard_sizes(manifest: Manifest) -> Ids:
    """Samples of each shard: [shards] int64."""
    return np.array([shard.samples for shard in manifest.shards], np.int64)


class Stream(ABC):
    """Batches of a data set, for one rank.

    Args:
        dataset_dir: The data set's folder, as in `data_config`.
        data_config: How to read it.
        seed: The run's seed.
        global_batch: Samples an optimizer step, over all ranks.
        micro_batch: Samples a batch.
        rank: This process among `world`.
        world: Processes that share the global batch.
        flips: Which visits are mirrored; None: none.
        draws: Which of several captions each visit takes; None: the first.
        command: What makes the data set, for errors.

    Raises:
        ValueError: the data set is missing, of another kind, or the batch sizes do not divide.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        dataset_dir: str,
        data_config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        flips: Flips | None = None,
        draws: Draws | None = None,
        command: str = "",
    ) -> None:
        option = _option_of(dataset_dir, data_config)
        self.option, self.config, self.command = option, data_config, command
        folder, self.manifest = self._load(dataset_dir)
        if global_batch % (micro_batch * world):
            raise ValueError(
                f"train.global_batch_size: {global_batch} is no multiple of "
                f"train.micro_batch_size {micro_batch} x {world} ranks"
            )
        self.reader = ShardReader(folder, self.manifest, data_config.cache)
        self.quarantine = Quarantine(self.num_samples, data_config.max_rejected_share, self.option)
        self._seed, self._rank, self._world = seed, rank, world
        self._flips, self._draws = flips, draws
        self._global_batch, self._micro_batch = global_batch, micro_batch

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return self.manifest.samples

    @cached_property
    def plan(self) -> LanePlan | MixturePlan:
        """The order of samples."""
        return LanePlan(shard_sizes(self.manifest), **self._order())

    @property
    def identity(self) -> str:
        """What the samples and their numbers are, as a hash."""
        return self.manifest.hash

    def shard_names(self, index: Ids) -> list[str]:
        """Return the shards of samples by number, as the manifest names them."""
        ends = np.cumsum(shard_sizes(self.manifest))
        numbers = np.searchsorted(ends, index, side="right")
        return [self.manifest.shards[number].name for number in numbers.tolist()]

    def check_access(self, step: int) -> None:
        """See whether the shards of this rank's first and last sample of a step can be read.

        Raises:
            ManifestError: one is missing, cut off or replaced.
            OSError: the store cannot be read.
        """
        _, index = self.plan.rank_slice(step, self._rank, self._world)
        for sample in {int(index[0]), int(index[-1])}:
            self.reader.check_access(sample)

    def cursor(self, step: int) -> Cursor:
        """Return the cursor of a run that has trained `step` steps."""
        return Cursor(
            version=VERSION,
            manifest_hash=self.identity,
            **self._order(),
            samples=step * self._global_batch,
        )

    def steps(self, start_step: int) -> Generator[list[Batch], None, None]:
        """Yield this rank's micro batches of each optimizer step, read ahead, without end.

        Raises:
            ValueError: more than data.max_rejected_share of the samples are bad.
        """
        accumulated = self._global_batch // (self._micro_batch * self._world)
        with (
            closing(Prefetcher(self.reader.cache)) as prefetcher,
            closing(self._read_ahead(self._requests(start_step, prefetcher))) as results,
        ):
            while True:
                step = list(islice(results, accumulated))
                for _, rejected in step:
                    self.quarantine.meet(rejected)
                yield [batch for batch, _ in step]

    def read(self, index: Ids) -> Batch:
        """Read samples by number, as they are; bad ones are left out and noted in `quarantine`.

        Of several captions the first is taken.

        Raises:
            ValueError: none is left, or more than data.max_rejected_share of all are bad.
        """
        index = np.asarray(index, np.int64)
        as_they_are = Visits(np.zeros(len(index), bool), np.zeros(len(index)))
        rows = self._read(self.reader.find(index), as_they_are)
        self.quarantine.meet(rows.bad.values())
        kept = [row for row in range(len(index)) if row not in rows.bad]
        if not kept:
            raise ValueError(f"{self.option}: none of the {len(index)} samples asked for is usable")
        return self._batch(rows.take(kept), np.zeros(len(kept), np.int64), index[kept])

    def captions(self, index: Ids) -> list[str]:
        """Read the captions of samples by number, the first of each, without their tensors.

        Raises:
            BadSampleError: a caption cannot be read.
        """
        found, form = self.reader.find(np.asarray(index, np.int64)), self.config.captions
        return [choose_caption(stored.member, form) for stored in found]

    def _load(self, folder: str) -> tuple[str, Manifest]:
        """Return where the shards are, and their manifest."""
        return folder, self._load_manifest(folder, self.option)

    def _load_manifest(self, folder: str, option: str) -> Manifest:
        manifest = Manifest.load(folder, option=option, command=self.command)
        if manifest.kind is not self.kind:
            raise ManifestError(f"{option}: {folder} holds {manifest.kind}, not {self.kind}")
        return manifest

    def _order(self) -> dict[str, int]:
        return {
            "seed": self._seed,
            "lanes": self.config.lanes,
            "block": self.config.shuffle_block,
            "global_batch": self._global_batch,
        }

    def _requests(self, start_step: int, prefetcher: Prefetcher) -> Iterator[Request]:
        share = self._global_batch // self._world
        block_steps = -(-self.config.shuffle_block * self.config.lanes // self._global_batch)
        for step in count(start_step):
            if self.reader.is_remote:
                shards = self._shards(step, steps_ahead=block_steps)
                prefetcher.want(self.reader.remote_files(shards))
            epoch, index = self.plan.rank_slice(step, self._rank, self._world)
            visits = Visits(
                np.zeros(share, bool) if self._flips is None else self._flips(epoch, index),
                np.zeros(share) if self._draws is None else self._draws(epoch, index),
            )
            for start in range(0, share, self._micro_batch):
                part = slice(start, start + self._micro_batch)
                yield Request(
                    step=step,
                    place=self._rank * share + start,
                    epoch=epoch[part],
                    index=index[part],
                    visits=visits.part(part),
                )

    def _shards(self, step: int, *, steps_ahead: int) -> Ids:
        return self.plan.shards(step, self._rank, self._world, steps_ahead=steps_ahead)

    def _read_ahead(self, requests: Iterator[Request]) -> Generator[Result, None, None]:
        return read_ahead.with_thread(self._answer, requests, depth=self.config.prefetch)

    def _answer(self, request: Request) -> Result:
        """Read a micro batch; the next usable sample of its block stands in for a bad one."""
        if self.reader.is_remote:
            self.reader.keep(self._shards(request.step, steps_ahead=0))
        rows = self._read(self.reader.find(request.index), request.visits)
        rejected = list(rows.bad.values())
        for row in rows.bad:
            for substitute in self.plan.substitutes(request.step, request.place + row):
                stored = self.reader.find(np.array([substitute]))
                other = self._read(stored, request.visits.part(slice(row, row + 1)))
                rejected += other.bad.values()
                if not other.bad:
                    rows.replace(row, other)
                    break
            else:
                raise ValueError(f"{self.option}: a whole block is bad; last: {rejected[-1]}")
        return self._batch(rows, request.epoch, request.index), rejected

    def _batch(self, rows: Rows, epoch: Ids, index: Ids) -> Batch:
        return Batch(
            epoch=epoch,
            index=index,
            keys=rows.keys,
            captions=rows.captions,
            arrays={
                name: self._finish(torch.from_numpy(array)) for name, array in rows.arrays.items()
            },
        )

    @abstractmethod
    def _read(self, samples: StoredBatch, visits: Visits) -> Rows:
        """Read samples as each visit sees them."""

    def _finish(self, stack: torch.Tensor) -> torch.Tensor:
        """Turn stacked arrays into those of a batch."""
        return stack


def _option_of(dataset_dir: str, config: DataConfig) -> str:
    """Name the option that holds a folder, for errors."""
    options = {"data.train": config.train, "data.val": config.val, "data.latents": config.latents}
    return next((name for name, value in options.items() if value == dataset_dir), "data.dir")
