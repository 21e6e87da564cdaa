"""Features of the training images that samples are compared with: load them, or make them once."""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.read_ahead import with_thread
from data.streams.images import ImageStream
from trainer.config import Config
from trainer.config.choices import Features
from trainer.metrics.extractors import build_extractors
from trainer.metrics.feature_set import FeatureSet, batches
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.reference import MAX_ROWS, ReferenceSource, load_reference
from trainer.metrics.unfinished import UnfinishedReference
from trainer.pictures.png import to_uint8
from trainer.runtime import rng
from trainer.runtime.placement import on_device
from trainer.runtime.progress import Stopping, never, progress_bar
from trainer.runtime.ranks import Ranks
from trainer.runtime.rng import Purpose
from trainer.streams import open_images

SAVE_EVERY_S = 60.0
"""Time between saves; a killed process loses the work since the last one."""
THREADS = 4
"""Decoding releases the interpreter lock; four threads are faster than an extractor."""


def build_references(config: Config, ranks: Ranks) -> "References":
    """Open the training images and build the extractors of eval.features.

    Raises: FileNotFoundError or ValueError that names the config path of missing data or weights.
    """
    images = open_training_images(config, ranks)
    return References(config, ranks, images, build_extractors(config, config.eval.features))


def open_training_images(config: Config, ranks: Ranks) -> ImageStream:
    """Open data.train on this rank alone, to read images by number."""
    return open_images(config, Ranks(0, 1, ranks.device), "train")


class References:
    """The references of an experiment, one for each of eval.features; collective.

    Ranks share the images; the result does not depend on the number of ranks.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        images: ImageStream,
        extractors: Mapping[Features, FeatureExtractor],
    ) -> None:
        """extractors: those of eval.features, and perhaps more."""
        self._config, self._ranks, self._images = config, ranks, images
        self._extractors = extractors
        self._is_ready = False
        self.loaded: dict[Features, FeatureSet] = {}
        """The loaded references; on rank 0."""
        self._made: dict[Features, FeatureSet] = {}
        """Those that this process has made; on rank 0."""

    def about(self) -> dict[str, object]:
        """Return the images of the references, as the part of a protocol."""
        return {
            "dataset": self._images.manifest.hash,
            "num_samples": self._count,
            "seed": self._config.eval.seed,
            **({"choice": self._choice} if self._choice else {}),
        }

    def load_or_make(self, stopping: Stopping) -> bool:
        """Make the missing references, then load all; one that cannot be written stays in memory.

        stopping: called between batches. Returns False if asked to stop; the finished part is
        saved, and the next call continues.
        Raises: ValueError that names eval.references, or the damaged file in it.
        """
        if self._is_ready:
            return True
        folder, missing = self._folder(), self.missing()
        if missing and not self._make(folder, missing, stopping):
            return False
        for name in self._config.eval.features if self._ranks.is_main else []:
            source = self._source(name)
            unsaved = name in self._made and not source.path(folder).exists()
            self.loaded[name] = self._made[name] if unsaved else load_reference(folder, source)
        self._made.clear()
        self._is_ready = True
        return True

    def load_if_made(self) -> None:
        """Load the references if none is missing: the training must not start with a damaged one.

        Raises: ValueError that names eval.references, or the damaged file in it.
        """
        if not self.missing():
            self.load_or_make(never)

    def _folder(self) -> Path:
        if "://" in self._config.eval.references:
            raise ValueError(
                f"eval.references={self._config.eval.references}: choose a folder on a disk that "
                "all ranks see"
            )
        return Path(self._config.eval.references)

    def missing(self) -> list[Features]:
        """Return the references that rank 0 does not find; other ranks may see an older disk."""
        folder = self._folder()
        sources = {name: self._source(name) for name in self._config.eval.features}
        return self._ranks.from_main(
            lambda: [name for name, own in sources.items() if not own.path(folder).exists()]
        )

    @property
    def _count(self) -> int:
        total = self._images.num_samples
        return min(self._config.eval.reference_samples or total, total)

    @property
    def _choice(self) -> str:
        """Name of the draws that choose images or kept features; empty if all are used."""
        is_whole = self._count == self._images.num_samples and self._count <= MAX_ROWS
        return "" if is_whole else rng.CHOICE_STREAM

    def _source(self, name: Features) -> ReferenceSource:
        extractor = self._extractors[name]
        return ReferenceSource(
            features=str(name),
            fingerprint=extractor.fingerprint,
            resize=extractor.resize,
            dataset=self._images.manifest.hash,
            image_size=self._config.data.image_size,
            num_samples=self._count,
            seed=self._config.eval.seed,
            choice=self._choice,
        )

    def _make(self, folder: Path, names: Sequence[Features], stopping: Stopping) -> bool:
        """Make references; return False if asked to stop."""
        size, device = self._config.eval.batch_size, self._ranks.device
        making = [
            UnfinishedReference(
                folder, self._source(name), self._extractors[name], size, self._ranks
            )
            for name in names
        ]
        for one in making:
            one.resume()
        chosen, kept = self._choose()
        start = min(one.done for one in making)
        parts = batches(len(chosen), size, self._ranks, start)
        last_save_s, stopped = time.monotonic(), False
        with (
            on_device([one.extractor for one in making], device),
            closing(read_images(self._images, chosen, parts, kept)) as images,
            progress_bar(
                len(chosen), "making references", "image", hidden=not self._ranks.is_main
            ) as bar,
            torch.inference_mode(),
        ):
            bar.update(start)
            for turn, (part, (batch, rows)) in enumerate(zip(parts, images, strict=True), 1):
                if stopped := stopping("making references"):
                    break
                end = min(start + turn * size * self._ranks.world_size, len(chosen))
                for one in making:
                    one.update(part, end, batch, rows)
                bar.update(end - bar.n)
                if time.monotonic() - last_save_s > SAVE_EVERY_S:
                    self._save(making)
                    last_save_s = time.monotonic()
        if stopped:
            self._save(making)
            return False
        for name, one in zip(names, making, strict=True):
            found = one.finish()
            if found is not None:
                self._made[name] = found
        return True

    @staticmethod
    def _save(making: Sequence[UnfinishedReference]) -> None:
        for one in making:
            one.save()

    def _choose(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Choose images at random.

        Returns their numbers in ascending order, and the numbers of the images whose features are
        kept; None: all.
        """
        total, count = self._images.num_samples, self._count
        order = rng.chosen(self._config.eval.seed, Purpose.choice, 1, 0, total, count)
        return np.sort(order), order[:MAX_ROWS] if count > MAX_ROWS else None


ImageBatch = tuple[Tensor | None, Tensor | None]
"""(images, kept). images: [B, 3, S, S] uint8; None if a rank has no batch in the last round.
kept: [B] bool, the images whose features are kept; None: all."""


def read_images(
    images: ImageStream,
    numbers: NDArray[np.int64],
    parts: Sequence[range],
    kept: NDArray[np.int64] | None = None,
) -> Generator[ImageBatch, None, None]:
    """Read batches of images ahead, in threads.

    numbers: images of the data set. parts: positions in `numbers`, for each batch. kept: numbers of
    the images whose features are kept; None: all.
    """

    def read(part: range) -> ImageBatch:
        if not part:
            return None, None
        batch = images.read(numbers[part.start : part.stop])
        rows = None if kept is None else torch.as_tensor(np.isin(batch.index, kept))
        return to_uint8(batch.arrays["images"]), rows

    yield from with_thread(read, iter(parts), depth=THREADS, threads=THREADS)
