"""Latent shards, written beside the encoder."""

import dataclasses
import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from torch import Tensor

from data.codecs import encode_npy
from data.manifest import Kind, Rejected, Shard
from data.writer import ShardWriter
from trainer.decoder import Samples
from trainer.encoder import Encoded
from trainer.progress import Progress
from trainer.receipts import LatentFolder, Receipt

MAX_PENDING = 16
"""Batches that wait to be written: enough to encode on while a shard is closed and hashed."""


class LatentWriter:
    """Writes encoded batches in a thread of its own; leaving the `with` block waits for it."""

    def __init__(self, folder: LatentFolder, progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        self._pool = ThreadPoolExecutor(1, "latent-writer")
        self._pending: deque[Future[None]] = deque()
        self._shard: _LatentShard | None = None
        self._failed = False
        self.finished = 0
        """Shards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while error is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
            if self._shard is not None:
                self._shard.discard()

    def write(self, samples: Samples, encoded: Encoded | None) -> None:
        """Take a batch, in the shard's order; None where no sample is good.

        Raises: OSError if an earlier one could not be written.
        """
        pending = self._pending
        pending.append(self._pool.submit(self._write, samples, encoded))
        while pending and (len(pending) > MAX_PENDING or pending[0].done()):
            pending.popleft().result()

    def _write(self, samples: Samples, encoded: Encoded | None) -> None:
        if self._failed:
            return  # a shard that lost a batch must not be finished
        self._failed = True
        try:
            self._store(samples, encoded)
        except OSError as error:
            raise OSError(
                f"data.latents: {self._folder.path} cannot be written: {error.strerror or error}"
            ) from error
        self._failed = False

    def _store(self, samples: Samples, encoded: Encoded | None) -> None:
        piece = samples.piece
        if self._shard is None:
            self._shard = _LatentShard(self._folder, piece.source)
        encoder_s = 0.0
        self._shard.rejected += samples.rejected
        if encoded is not None:
            encoder_s = encoded.wait()
            self._shard.add(samples, encoded.arrays)
        if piece.last:
            self._folder.finish(piece.source, self._shard.close())
            self._shard = None
            self.finished += 1
        self._progress.add(len(piece.samples), encoder_s)


class _LatentShard:
    """A shard on its way to the disk, and its sums."""

    def __init__(self, folder: LatentFolder, source: Shard) -> None:
        self._source, self._identity = source, folder.identity
        self._writer = ShardWriter(folder.path, source.name, Kind.latents)
        self._sums: list[np.ndarray] = []
        self._count, self._shape = 0, [0, 0, 0]
        self.rejected: list[Rejected] = []

    def add(self, samples: Samples, arrays: dict[str, Tensor]) -> None:
        """Append a batch, without the samples that have a value which is not finite."""
        finite = np.ones(len(samples.keys), bool)
        for values in arrays.values():
            finite &= values.flatten(1).isfinite().all(1).numpy()
        mean, log_variance = arrays["moments.npy"].double().flatten(3).numpy().swapaxes(0, 1)
        sums = np.stack([mean.sum(2), (mean**2 + np.exp(log_variance)).sum(2)], axis=1)
        for row, key in enumerate(samples.keys):
            if not finite[row]:
                self.rejected.append(
                    Rejected(key=key, reason="latents not finite", shard=self._source.name)
                )
                continue
            encoded = {name: encode_npy(values[row].numpy()) for name, values in arrays.items()}
            self._writer.write(key, encoded | samples.copied[row])
            self._sums.append(sums[row])
            self._count += mean.shape[2]
            self._shape = list(arrays["moments.npy"].shape[2:])

    def close(self) -> Receipt:
        """Publish the shard."""
        shard = self._writer.close()
        sums, square_sums = [
            [math.fsum(channel) for channel in zip(*rows, strict=True)]
            for rows in zip(*self._sums, strict=True)
        ] or [[], []]
        return Receipt(
            identity=self._identity,
            source_sha256=self._source.sha256,
            shard=dataclasses.asdict(shard),
            shape=self._shape,
            count=self._count,
            sums=sums,
            square_sums=square_sums,
            rejected=[dataclasses.asdict(item) for item in self.rejected],
        )

    def discard(self) -> None:
        """Leave nothing behind."""
        self._writer.discard()
