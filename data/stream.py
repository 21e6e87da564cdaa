"""The samples of a data set as batches: in the plan's order to train on, or by number."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Any, ClassVar

import numpy as np
import torch

from data import read_ahead
from data.codecs import BadSampleError, decode_npy, decode_text
from data.config import DataConfig
from data.cursor import VERSION, Cursor
from data.manifest import Kind, Manifest, ManifestError, Rejected
from data.plan import Ids, LanePlan
from data.reader import ShardReader, StoredSample, decode_square

Flips = Callable[[Ids, Ids], np.ndarray]
"""(epoch [B], index [B]) → [B] bool: whether each visit is mirrored."""


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
    """float32. images: [B, 3, S, S] in [-1, 1]; moments: [B, 2, C, h, w]; text: [B, T, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A micro batch to read; `place` is that of its first sample in the global batch."""

    step: int
    place: int
    epoch: Ids
    index: Ids
    flip: np.ndarray


@dataclass(slots=True, kw_only=True)
class _Sample:
    key: str
    caption: str
    arrays: dict[str, np.ndarray]


_Result = tuple[Batch, list[Rejected]]


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
        command: str = "",
    ) -> None:
        option = _option_of(dataset_dir, data_config)
        self.manifest = Manifest.load(dataset_dir, option=option, command=command)
        self.command = command
        if self.manifest.kind is not self.kind:
            raise ManifestError(
                f"{option}: {dataset_dir} holds {self.manifest.kind}, not {self.kind}"
            )
        if global_batch % (micro_batch * world):
            raise ValueError(
                f"train.global_batch_size: {global_batch} is no multiple of "
                f"train.micro_batch_size {micro_batch} x {world} ranks"
            )
        self.option, self.config = option, data_config
        self.reader = ShardReader(dataset_dir, self.manifest)
        self._ledger: dict[tuple[str, str], Rejected] = {}
        self._seed, self._rank, self._world, self._flips = seed, rank, world, flips
        self._global_batch, self._micro_batch = global_batch, micro_batch

    @property
    def rejected(self) -> list[Rejected]:
        """The bad samples met so far, each once."""
        return list(self._ledger.values())

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return self.manifest.samples

    @cached_property
    def plan(self) -> LanePlan:
        """The order of samples."""
        return LanePlan(
            np.array([shard.samples for shard in self.manifest.shards], np.int64),
            seed=self._seed,
            lanes=self.config.lanes,
            block=self.config.shuffle_block,
            global_batch=self._global_batch,
        )

    def cursor(self, step: int) -> Cursor:
        """Return the cursor of a run that has trained `step` steps."""
        return Cursor(
            version=VERSION,
            manifest_hash=self.manifest.hash,
            seed=self._seed,
            lanes=self.config.lanes,
            block=self.config.shuffle_block,
            global_batch=self._global_batch,
            samples=step * self._global_batch,
        )

    def steps(self, start_step: int) -> Generator[list[Batch], None, None]:
        """Yield this rank's micro batches of each optimizer step, read ahead, without end.

        Raises:
            ValueError: more than data.max_rejected_share of the samples are bad.
        """
        accumulated = self._global_batch // (self._micro_batch * self._world)
        with closing(self._read_ahead(self._requests(start_step))) as results:
            while True:
                step = list(islice(results, accumulated))
                for _, rejected in step:
                    self._note(rejected)
                yield [batch for batch, _ in step]

    def read(self, index: Ids) -> Batch:
        """Read samples by number, as they are; bad ones are left out and noted in `rejected`.

        Raises:
            ValueError: none is left, or more than data.max_rejected_share of all are bad.
        """
        index = np.asarray(index, np.int64)
        samples: list[_Sample] = []
        kept: list[bool] = []
        rejected: list[Rejected] = []
        for stored in self.reader.find(index):
            sample = self._try(stored, False, rejected)
            kept.append(sample is not None)
            if sample is not None:
                samples.append(sample)
        self._note(rejected)
        if not samples:
            raise ValueError(f"{self.option}: none of the {len(index)} samples asked for is usable")
        return self._batch(samples, np.zeros(len(samples), np.int64), index[np.array(kept)])

    def captions(self, index: Ids) -> list[str]:
        """Read the captions of samples by number, without their tensors.

        Raises:
            BadSampleError: a caption cannot be read.
        """
        return [_caption(stored) for stored in self.reader.find(np.asarray(index, np.int64))]

    def _requests(self, start_step: int) -> Iterator[_Request]:
        share = self._global_batch // self._world
        for step in count(start_step):
            epoch, index = self.plan.rank_slice(step, self._rank, self._world)
            flip = np.zeros(share, bool) if self._flips is None else self._flips(epoch, index)
            for start in range(0, share, self._micro_batch):
                part = slice(start, start + self._micro_batch)
                yield _Request(
                    step=step,
                    place=self._rank * share + start,
                    epoch=epoch[part],
                    index=index[part],
                    flip=flip[part],
                )

    def _read_ahead(self, requests: Iterator[_Request]) -> Generator[_Result, None, None]:
        return read_ahead.with_thread(self._answer, requests, depth=self.config.prefetch)

    def _answer(self, request: _Request) -> _Result:
        """Read a micro batch; the next usable sample of its block stands in for a bad one."""
        samples: list[_Sample] = []
        rejected: list[Rejected] = []
        for number, stored in enumerate(self.reader.find(request.index)):
            flip = bool(request.flip[number])
            sample = self._try(stored, flip, rejected)
            if sample is None:
                substitutes = self.plan.substitutes(request.step, request.place + number)
                for substitute in substitutes:
                    (stored,) = self.reader.find(np.array([substitute]))
                    sample = self._try(stored, flip, rejected)
                    if sample is not None:
                        break
                else:
                    raise ValueError(f"{self.option}: a whole block is bad; last: {rejected[-1]}")
            samples.append(sample)
        return self._batch(samples, request.epoch, request.index), rejected

    def _try(self, stored: StoredSample, flip: bool, rejected: list[Rejected]) -> _Sample | None:
        try:
            arrays = self._arrays(stored, flip)
            caption = _caption(stored)
        except BadSampleError as error:
            name = stored.shard.name
            rejected.append(Rejected(key=stored.key, reason=str(error), shard=name))
            return None
        return _Sample(key=stored.key, caption=caption, arrays=arrays)

    def _batch(self, samples: list[_Sample], epoch: Ids, index: Ids) -> Batch:
        stacked = {
            name: torch.from_numpy(np.stack([sample.arrays[name] for sample in samples]))
            for name in samples[0].arrays
        }
        return Batch(
            epoch=epoch,
            index=index,
            keys=[sample.key for sample in samples],
            captions=[sample.caption for sample in samples],
            arrays={name: self._to_float(stack) for name, stack in stacked.items()},
        )

    def _note(self, rejected: list[Rejected]) -> None:
        """Enter bad samples into the ledger, each once however often it is met."""
        for item in rejected:
            self._ledger.setdefault((item.shard, item.key), item)
        if rejected and len(self._ledger) > self.config.max_rejected_share * self.num_samples:
            bad = rejected[-1]
            raise ValueError(
                f"data.max_rejected_share: {len(self._ledger)} of {self.num_samples} samples of "
                f"{self.option} are bad; the last is {bad.key} in {bad.shard}: {bad.reason}"
            )

    @abstractmethod
    def _arrays(self, stored: StoredSample, flip: bool) -> dict[str, np.ndarray]:
        """Decode a sample's tensors; of the same shapes for every sample."""

    @abstractmethod
    def _to_float(self, stack: torch.Tensor) -> torch.Tensor:
        """Turn stacked arrays into what the networks take."""


class ImageStream(Stream):
    """Images, decoded while training: by data.workers processes, each building whole batches."""

    kind = Kind.images

    def _read_ahead(self, requests: Iterator[_Request]) -> Generator[_Result, None, None]:
        workers = self.config.workers
        if workers == 0:
            return super()._read_ahead(requests)
        depth = self.config.prefetch
        return read_ahead.with_processes(self._answer, requests, workers=workers, depth=depth)

    def _arrays(self, stored: StoredSample, flip: bool) -> dict[str, np.ndarray]:
        pixels = decode_square(stored, self.config.image_size)
        return {"images": pixels[:, ::-1] if flip else pixels}

    def _to_float(self, stack: torch.Tensor) -> torch.Tensor:
        return stack.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


class LatentStream(Stream):
    """Latents made by trainer.precompute: a thread that gathers from mapped shards is enough."""

    kind = Kind.latents

    def __init__(self, dataset_dir: str, data_config: DataConfig, **options: Any) -> None:
        super().__init__(dataset_dir, data_config, **options)
        if self.manifest.latents is None:
            raise ManifestError(
                f"{self.option}: the manifest in {dataset_dir} describes no latents"
            )
        self._latents = self.manifest.latents
        if options.get("flips") is not None and not self._latents.flip:
            raise ValueError(
                f"data.flip: {dataset_dir} has no mirrored latents; set data.flip=false, or "
                f"delete them and run `{self.command}` again"
            )
        if data_config.store_text and not self._latents.text:
            raise ValueError(
                f"data.store_text: {dataset_dir} has no text embeddings; set data.store_text=false,"
                f" or delete it and run `{self.command}` again"
            )

    def _arrays(self, stored: StoredSample, flip: bool) -> dict[str, np.ndarray]:
        name = "flip.moments.npy" if flip else "moments.npy"
        moments = decode_npy(stored.payload(name))
        if moments.dtype != np.float16 or moments.shape != (2, *self._latents.shape):
            raise BadSampleError(f"latents of {moments.dtype} {moments.shape}")
        arrays = {"moments": moments}
        if self.config.store_text:
            arrays["text"] = decode_npy(stored.payload("text.npy"))
        return arrays

    def _to_float(self, stack: torch.Tensor) -> torch.Tensor:
        return stack.float()


def _option_of(dataset_dir: str, config: DataConfig) -> str:
    """Name the option that holds a folder, for errors."""
    options = {"data.train": config.train, "data.val": config.val, "data.latents": config.latents}
    return next((name for name, value in options.items() if value == dataset_dir), "data.dir")


def _caption(stored: StoredSample) -> str:
    return decode_text(stored.payload("txt" if stored.has("txt") else "cls"))
