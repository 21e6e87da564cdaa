"""Write latent shards in a thread, while the encoder goes on."""

import dataclasses
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

from data.shards.codecs import BadSampleError, encode_npy
from data.shards.manifest import Kind, Rejected, Shard
from data.shards.writer import ShardWriter
from trainer.precompute.decode import Samples
from trainer.precompute.encode import Encoded
from trainer.precompute.folder import LatentFolder, Receipt
from trainer.precompute.progress import EncodingProgress

MAX_PENDING = 16
"""Most batches that wait to be written: encoding goes on while a shard is closed and hashed."""


class LatentWriter:
    """Writes encoded batches in a thread; the end of the `with` block waits for the thread."""

    def __init__(self, folder: LatentFolder, progress: EncodingProgress) -> None:
        self._folder, self._progress = folder, progress
        self._pool = ThreadPoolExecutor(1, "latent-writer")
        self._pending: deque[Future[None]] = deque()
        self._shard: _LatentShard | None = None
        self._failed = False
        self.finished = 0
        """Number of shards finished."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            while error is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
            if self._shard is not None:
                self._shard.discard()

    def write(self, samples: Samples, encoded: Encoded | None) -> None:
        """Queue a batch; batches come in the order of the shard.

        encoded: None if the batch has no good sample.
        Raises: OSError if an earlier batch could not be written.
        """
        pending = self._pending
        pending.append(self._pool.submit(self._write, samples, encoded))
        while pending and (len(pending) > MAX_PENDING or pending[0].done()):
            pending.popleft().result()

    def _write(self, samples: Samples, encoded: Encoded | None) -> None:
        if self._failed:
            return  # the shard lacks a batch, so it must not be finished
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
        self._shard.noted += samples.noted
        if encoded is not None:
            encoder_s = encoded.wait()
            self._shard.add(samples, encoded.arrays)
        if piece.last:
            self._folder.finish(piece.source, self._shard.close())
            self._shard = None
            self.finished += 1
        self._progress.add(len(piece.samples), encoder_s)


class _LatentShard:
    """An unfinished shard on the disk, and its sums."""

    def __init__(self, folder: LatentFolder, source: Shard) -> None:
        self._source, self._identity = source, folder.identity
        self._writer = ShardWriter(folder.path, source.name, Kind.latents)
        self._sums: list[np.ndarray] = []
        self._count, self._shape = 0, [0, 0, 0]
        self.rejected: list[Rejected] = []
        self.noted: Counter[str] = Counter()

    def add(self, samples: Samples, arrays: Mapping[str, Sequence[Tensor]]) -> None:
        """Append a batch; reject samples with a value that is not finite.

        arrays: see `Encoded.arrays`.
        """
        finite = [
            all(bool(values[row].isfinite().all()) for values in arrays.values())
            for row in range(len(samples.keys))
        ]
        moments = torch.stack(list(arrays["moments.npy"]))
        mean, log_variance = moments.double().flatten(3).numpy().swapaxes(0, 1)
        sums = np.stack([mean.sum(2), (mean**2 + np.exp(log_variance)).sum(2)], axis=1)
        for row, key in enumerate(samples.keys):
            if not finite[row]:
                self.rejected.append(
                    Rejected(key=key, reason="latents not finite", shard=self._source.name)
                )
                continue
            encoded = {name: encode_npy(values[row].numpy()) for name, values in arrays.items()}
            try:
                self._writer.write(key, encoded | samples.copied[row])
            except BadSampleError as error:  # 0.1.0 packed samples under such keys
                bad = Rejected(key=key, reason=str(error), shard=self._source.name)
                self.rejected.append(bad)
                continue
            self._sums.append(sums[row])
            self._count += mean.shape[2]
            self._shape = list(moments.shape[2:])

    def close(self) -> Receipt:
        """Rename the shard to its final name, and return its receipt."""
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
            noted=dict(self.noted),
        )

    def discard(self) -> None:
        """Delete the unfinished files."""
        self._writer.discard()
