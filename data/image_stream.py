"""Images as batches, decoded while training."""

from collections.abc import Generator, Iterator

import numpy as np
import torch

from data import read_ahead
from data.captions import choose_caption
from data.codecs import BadSampleError
from data.manifest import Kind
from data.stored import StoredBatch, decode_square
from data.stream import Request, Result, Rows, Stream, Visits


class ImageStream(Stream):
    """Images, decoded while training: by data.workers processes, each building whole batches."""

    kind = Kind.images

    def _read_ahead(self, requests: Iterator[Request]) -> Generator[Result, None, None]:
        workers = self.config.workers
        if workers == 0:
            return super()._read_ahead(requests)
        depth = self.config.prefetch
        return read_ahead.with_processes(self._answer, requests, workers=workers, depth=depth)

    def _read(self, samples: StoredBatch, visits: Visits) -> Rows:
        side, form = self.config.image_size, self.config.captions
        images = np.empty((len(samples), side, side, 3), np.uint8)
        captions = [""] * len(samples)
        rows = Rows(keys=samples.keys(), captions=captions, arrays={"images": images}, bad={})
        for row, stored in enumerate(samples):
            try:
                pixels = decode_square(stored, side)
                images[row] = pixels[:, ::-1] if visits.flip[row] else pixels
                captions[row] = choose_caption(stored.member, form, visits.draw[row])
            except BadSampleError as error:
                rows.reject(row, stored, error)
        return rows

    def _finish(self, stack: torch.Tensor) -> torch.Tensor:
        return stack.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
