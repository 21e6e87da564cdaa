"""Make batches of the samples of a data set."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch

from data import read_ahead
from data.config import DataConfig
from data.order.batches import Share
from data.order.cursor import VERSION, Cursor
from data.order.plan import Plan
from data.shards.annotations import Box
from data.shards.cache import Prefetcher
from data.shards.captions import read_captions
from data.shards.codecs import BadSampleError
from data.shards.manifest import Ids, Rejected
from data.shards.stored import StoredBatch, StoredSample
from data.shards.transforms import CENTRE
from data.streams.data_set import OpenDataSet, annotation_rule
from data.streams.quarantine import Quarantine
from data.streams.rows import Rows

Draw = Callable[[Ids, Ids], np.ndarray]
"""(epoch [B], index [B]) → [B] or [B, n]: random values for each visit to a sample."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """A micro batch."""

    epoch: Ids
    """[B] int64, number of the visit to the sample."""
    index: Ids
    """[B] int64, planned number of the sample in the manifest's order; draws depend on it."""
    keys: list[str]
    """[B], key of each sample; a substitute has another key than the sample of `index`."""
    captions: list[str]
    """[B], caption or class of each sample."""
    arrays: dict[str, torch.Tensor]
    """images: [B, 3, S, S] float32 in [-1, 1], also beside moments with data.store_images;
    moments: [B, 2, C, h, w] and text: [B, T, D] float16, as stored;
    with data.maps, map: [B, S, S] uint8, class numbers."""
    boxes: list[list[Box]] = field(default_factory=list[list[Box]])
    """[B], with data.boxes: the boxes of each sample."""
    drawn: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """Tensors of B rows that `Stream.draw` adds, such as noise."""

    def tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with changed tensors."""
        return replace(
            self,
            arrays={name: change(tensor) for name, tensor in self.arrays.items()},
            drawn={name: change(tensor) for name, tensor in self.drawn.items()},
        )


class Visits(NamedTuple):
    """The random choices for visits to samples."""

    flip: np.ndarray
    """[B] bool, whether the sample is mirrored."""
    draw: np.ndarray
    """[B] from [0, 1), chooses one of the captions."""
    crop: np.ndarray
    """[B, 3], the fields of a `Crop`."""

    def part(self, rows: slice) -> "Visits":
        """Return the choices for some rows."""
        return Visits(self.flip[rows], self.draw[rows], self.crop[rows])


class Randomness(NamedTuple):
    """The random functions that every visit to a sample calls."""

    flip: Draw | None = None
    """Draws bool, whether the visit is mirrored; None: no visit is mirrored."""
    caption: Draw | None = None
    """Draws from [0, 1), chooses one of the captions; None: the first caption."""
    crop: Draw | None = None
    """Draws the fields of a `Crop`, [B, 3], for images; None: the largest centred square."""

    def visits(self, epoch: Ids, index: Ids) -> Visits:
        """Draw for the visits `epoch` [B] to the samples `index` [B]."""
        return Visits(
            np.zeros(len(index), bool) if self.flip is None else self.flip(epoch, index),
            np.zeros(len(index)) if self.caption is None else self.caption(epoch, index),
            np.tile(CENTRE, (len(index), 1)) if self.crop is None else self.crop(epoch, index),
        )


IMAGES = "images"
"""Name of the images in batches; they are read as [B, S, S, 3] uint8."""
NOTHING_DRAWN = Randomness()
"""Samples are not mirrored, cropped at the centre, and have their first captions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A micro batch to read."""

    step: int
    place: int
    """Position of its first sample in the global batch."""
    epoch: Ids
    index: Ids
    visits: Visits


Result = tuple[Batch, list[Rejected]]


def no_problem(caption: str) -> str:
    """Find no problem in any caption."""
    return ""


def draw_nothing(batch: Batch) -> dict[str, torch.Tensor]:
    """Draw nothing for a batch."""
    return {}


class Stream(ABC):
    """The batches of a data set for one rank, in the training order of the plan or by number.

    share: this rank's part of every global batch. randomness: random functions of training.
    """

    def __init__(
        self, data_set: OpenDataSet, config: DataConfig, share: Share, randomness: Randomness
    ) -> None:
        self.data_set, self.config = data_set, config
        self.option, self.manifest = data_set.option, data_set.manifest
        self.reader = data_set.reader
        self.share, self.randomness = share, randomness
        self.caption_problem: Callable[[str], str] = no_problem
        """Caption → the reason why the network cannot take it; empty for a good one."""
        self.draw: Callable[[Batch], dict[str, torch.Tensor]] = draw_nothing
        """Makes `Batch.drawn` of the batches of `steps`, ahead of time in the reading threads or
        processes."""
        self.consumed: frozenset[str] = frozenset()
        """Names of arrays that `draw` alone reads: they are not copied to the device."""
        self.pinned = False
        """Whether the batches of `steps` lie in page-locked memory, from which a GPU copies without
        a wait of this process. torch lends such memory anew when all copies from it have ended."""
        self.annotations = annotation_rule(config, self.manifest, self.option)
        self.quarantine = Quarantine(self.num_samples, config.max_rejected_share, self.option)

    @property
    @abstractmethod
    def decodes(self) -> bool:
        """Whether samples have pictures to decode, which data.workers processes do."""

    @property
    def num_samples(self) -> int:
        """Number of samples of the data set."""
        return self.manifest.samples

    @cached_property
    def plan(self) -> Plan:
        """The order of samples in training.

        The plan is made at its first use, because a validation set, read by number, may have fewer
        samples than lanes.
        Raises: ValueError where the lanes do not divide the batch or outnumber the samples.
        """
        return self.data_set.make_plan(**self._order())

    def shard_names(self, index: Ids) -> list[str]:
        """Return the names of the shards of samples [B], in the manifest's spelling."""
        ends = np.cumsum(self.manifest.shard_sizes)
        numbers: list[int] = np.searchsorted(ends, index, side="right").tolist()
        return [self.manifest.shards[number].name for number in numbers]

    def check_access(self, step: int) -> None:
        """Check that the shards of this rank's first and last sample of a step can be read.

        Raises: ManifestError where one is missing, cut off or replaced; OSError where the store
        cannot be read.
        """
        _, index = self._slice(step)
        for sample in {int(index[0]), int(index[-1])}:
            self.reader.check_access(sample)

    def cursor(self, step: int) -> Cursor:
        """Return the cursor of a run that has trained `step` steps."""
        return Cursor(
            version=VERSION,
            manifest_hash=self.data_set.identity,
            **self._order(),
            samples=step * self.share.global_batch,
        )

    def steps(self, start_step: int) -> Generator[list[Batch], None, None]:
        """Yield this rank's micro batches of each optimizer step from `start_step` on, without end.

        The batches are read ahead, data.prefetch micro batches.
        Raises: ValueError where more than data.max_rejected_share of the samples are bad.
        """
        with (
            closing(Prefetcher(self.reader.cache)) as prefetcher,
            closing(self._read_ahead(self._requests(start_step, prefetcher))) as results,
        ):
            while True:
                step = list(islice(results, self.share.grad_accum_steps))
                for _, rejected in step:
                    self.quarantine.record(rejected)
                yield [batch for batch, _ in step]

    def read(self, index: Ids) -> Batch:
        """Read samples by number [B], not mirrored, of the centre and with their first captions.

        Bad samples are left out and recorded in `quarantine`.
        Raises: ValueError where all are bad, or more than data.max_rejected_share of the data set.
        """
        index = np.asarray(index, np.int64)
        visits = NOTHING_DRAWN.visits(np.zeros_like(index), index)
        rows = self._read(self.reader.find(index), visits)
        self.quarantine.record(rows.bad.values())
        kept = [row for row in range(len(index)) if row not in rows.bad]
        if not kept:
            raise ValueError(f"{self.option}: none of the {len(index)} samples asked for is usable")
        return self._batch(rows.take(kept), np.zeros(len(kept), np.int64), index[kept])

    def captions(self, index: Ids) -> list[str]:
        """Read the first captions of samples by number [B], without their tensors.

        The next sample with a good caption stands in for a bad one, which `quarantine` records.
        Raises: ValueError where more than data.max_rejected_share of the data set are bad.
        """
        index = np.asarray(index, np.int64)
        captions: list[str] = []
        for number, stored in zip(index.tolist(), self.reader.find(index), strict=True):
            caption, step = self._caption(stored), 0
            while caption is None:
                step += 1
                if step == self.num_samples:
                    raise ValueError(f"{self.option}: no sample has a caption that can be read")
                (other,) = self.reader.find(np.array([(number + step) % self.num_samples]))
                caption = self._caption(other)
            captions.append(caption)
        return captions

    def _choose_caption(self, stored: StoredSample, draw: float = 0.0) -> str:
        """Return one of a sample's captions; draw: from [0, 1).

        Raises: BadSampleError where it cannot be read, or has a `caption_problem`.
        """
        captions, place = self._draw_caption(stored, draw)
        return captions[place]

    def _draw_caption(self, stored: StoredSample, draw: float) -> tuple[list[str], int]:
        """Return all captions of a sample, and the number of the one that is drawn.

        Raises: as `_choose_caption`.
        """
        rule = self.data_set.caption_rule(stored.shard.name)
        captions = read_captions(stored.member, rule)
        place = captions.place(draw)
        if problem := self.caption_problem(captions.texts[place]):
            raise BadSampleError(problem)
        return captions.texts, place

    def _caption(self, stored: StoredSample) -> str | None:
        try:
            return self._choose_caption(stored)
        except BadSampleError as error:
            self.quarantine.record([stored.rejected(error)])
            return None

    def _order(self) -> dict[str, int]:
        return {
            "seed": self.share.seed,
            "lanes": self.config.lanes,
            "block": self.config.shuffle_block,
            "global_batch": self.share.global_batch,
        }

    def _slice(self, step: int) -> tuple[Ids, Ids]:
        return self.plan.rank_slice(step, self.share.rank, self.share.world)

    def _shards(self, step: int, *, steps_ahead: int) -> Ids:
        share = self.share
        return self.plan.shards(step, share.rank, share.world, steps_ahead=steps_ahead)

    def _requests(self, start_step: int, prefetcher: Prefetcher) -> Iterator[Request]:
        share = self.share
        block_steps = -(-self.config.shuffle_block * self.config.lanes // share.global_batch)
        for step in count(start_step):
            if self.reader.is_remote:
                shards = self._shards(step, steps_ahead=block_steps)
                prefetcher.want(self.reader.remote_files(shards))
            epoch, index = self._slice(step)
            visits = self.randomness.visits(epoch, index)
            for start in range(0, share.samples, share.micro_batch):
                part = slice(start, start + share.micro_batch)
                yield Request(
                    step=step,
                    place=share.rank * share.samples + start,
                    epoch=epoch[part],
                    index=index[part],
                    visits=visits.part(part),
                )

    def _read_ahead(self, requests: Iterator[Request]) -> Generator[Result, None, None]:
        depth, workers = self.config.prefetch, self.config.workers
        if self.decodes and workers:
            results = read_ahead.with_processes(
                self._answer, requests, workers=workers, depth=depth
            )
            return self._pinned(results) if self.pinned else results

        def answer(request: Request) -> Result:
            return self._pin(self._answer(request))

        return read_ahead.with_thread(answer, requests, depth=depth)

    def _pinned(self, results: Generator[Result, None, None]) -> Generator[Result, None, None]:
        """Pin in a thread of this process: memory that a forked process pins is its own."""
        with closing(results):
            yield from read_ahead.with_thread(self._pin, results, depth=1)

    def _pin(self, result: Result) -> Result:
        batch, rejected = result
        return (batch.tensors(torch.Tensor.pin_memory) if self.pinned else batch), rejected

    def _answer(self, request: Request) -> Result:
        """Read a micro batch and draw for it; good samples of a block replace its bad ones."""
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
        batch = self._batch(rows, request.epoch, request.index)
        batch.drawn = self.draw(batch)
        for name in self.consumed & batch.arrays.keys():
            del batch.arrays[name]
        return batch, rejected

    def _batch(self, rows: Rows, epoch: Ids, index: Ids) -> Batch:
        return Batch(
            epoch=epoch,
            index=index,
            keys=rows.keys,
            captions=rows.captions,
            arrays={
                name: self._finish(name, torch.as_tensor(array))
                for name, array in rows.arrays.items()
            },
            boxes=rows.boxes,
        )

    @abstractmethod
    def _read(self, samples: StoredBatch, visits: Visits) -> Rows:
        """Read samples, each with the choices of its visit."""

    def _finish(self, name: str, stack: torch.Tensor) -> torch.Tensor:
        """Convert an array that was read to that of a batch."""
        if name != IMAGES:
            return stack
        return stack.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
