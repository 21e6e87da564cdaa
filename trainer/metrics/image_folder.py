"""Read a folder of image files in batches, by threads."""

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.read_ahead import with_thread
from data.shards.codecs import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, BadSampleError, decode_image
from data.shards.transforms import square
from data.storage.untrusted import read_file

THREADS = 4
"""Decoding releases the interpreter lock; four threads are faster than an extractor."""


class ImageFolder:
    """The images in a folder and its subfolders, in the order of their paths.

    Raises: ValueError that names the option, if there is no image.
    """

    def __init__(self, folder: str, image_size: int, option: str) -> None:
        self._option, self._image_size = option, image_size
        self._folder = Path(folder)
        found = self._folder.rglob("*")
        self.paths = sorted(p for p in found if p.suffix[1:].lower() in IMAGE_EXTENSIONS)
        if not self.paths:
            raise ValueError(f"{option}: no {', '.join(IMAGE_EXTENSIONS)} files in {folder}")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def read(self, batches: Sequence[range]) -> Generator[Tensor | None, None, None]:
        """Yield the images of each batch, [B, 3, S, S] uint8; None for an empty batch.

        batches: numbers of images. Images are cropped and resized like those of a data set.
        Raises: ValueError that names a damaged file; UnsafeFileError for one that is no file of the
        folder.
        """
        yield from with_thread(self._read, iter(batches), depth=THREADS, threads=THREADS)

    def _read(self, numbers: range) -> Tensor | None:
        if not numbers:
            return None
        images = np.empty((len(numbers), self._image_size, self._image_size, 3), np.uint8)
        for row, number in enumerate(numbers):
            path = self.paths[number]
            try:
                content = read_file(path, limit=MAX_IMAGE_BYTES, below=self._folder)
                images[row] = square(decode_image(content), self._image_size)
            except BadSampleError as error:
                raise ValueError(f"{self._option}: {path}: {error}") from error
        return torch.as_tensor(images).permute(0, 3, 1, 2)
