"""A folder of image files, read in batches by threads."""

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.codecs import IMAGE_EXTENSIONS, BadSampleError, decode_image
from data.read_ahead import with_thread
from data.transforms import square

THREADS = 4
"""Decoding holds no lock: more threads help until the extractor is never waiting."""


class ImageFolder:
    """The images of a folder and of its folders, in the order of their paths.

    Raises: ValueError naming the option where there is none.
    """

    def __init__(self, folder: str, image_size: int, option: str) -> None:
        self._option, self._image_size = option, image_size
        found = Path(folder).rglob("*")
        self.paths = sorted(p for p in found if p.suffix[1:].lower() in IMAGE_EXTENSIONS)
        if not self.paths:
            raise ValueError(f"{option}: no {', '.join(IMAGE_EXTENSIONS)} files in {folder}")

    def __len__(self) -> int:
        """Images."""
        return len(self.paths)

    def read(self, batches: Sequence[range]) -> Generator[Tensor | None, None, None]:
        """Images [B, 3, S, S] uint8 of each batch of numbers, None for an empty one; in order.

        They are cut and resized as the data set's are. Raises ValueError naming a damaged file.
        """
        yield from with_thread(self._read, iter(batches), depth=THREADS, threads=THREADS)

    def _read(self, numbers: range) -> Tensor | None:
        if not numbers:
            return None
        images = np.empty((len(numbers), self._image_size, self._image_size, 3), np.uint8)
        for row, number in enumerate(numbers):
            path = self.paths[number]
            try:
                images[row] = square(decode_image(path.read_bytes()), self._image_size)
            except BadSampleError as error:
                raise ValueError(f"{self._option}: {path}: {error}") from error
        return torch.from_numpy(images).permute(0, 3, 1, 2)
