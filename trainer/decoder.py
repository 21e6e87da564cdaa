"""From image shards to batches of pixels, with what a latent shard takes over as it is."""

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.captions import choose_caption
from data.codecs import CAPTION_EXTENSIONS, BadSampleError
from data.manifest import Manifest, Rejected, Shard
from data.read_ahead import with_processes, with_thread
from data.reader import ShardReader
from data.stored import decode_square
from trainer.config import Config

COPIED_EXTENSIONS = (*CAPTION_EXTENSIONS, "json")


class Piece(NamedTuple):
    """Samples of one shard that are decoded, encoded and written together.

    A function of the shard alone: networks may round a sample differently among other batch mates.
    """

    source: Shard
    samples: NDArray[np.int64]
    """Their numbers in the manifest's order."""
    last: bool
    """Whether the shard ends here."""


class Samples(NamedTuple):
    """The good samples of a piece apart from their pixels, and the bad ones."""

    piece: Piece
    keys: list[str]
    captions: list[str]
    copied: list[dict[str, bytes]]
    """A sample's members that are not encoded, by extension."""
    rejected: list[Rejected]


class Decoder:
    """Decodes and transforms images."""

    def __init__(self, config: Config, images: Manifest) -> None:
        self._size, self._captions = config.data.image_size, config.data.captions
        self._reader = ShardReader(config.data.train, images, config.data.cache)

    def __call__(self, piece: Piece) -> tuple[Samples, Tensor]:
        """Decode a piece: its samples, and the pixels of the good ones, [B, size, size, 3] uint8.

        Raises:
            ManifestError: the shard is missing, cut off or replaced.
        """
        keys, pixels, captions, copied, rejected = [], [], [], [], []
        for sample in self._reader.find(piece.samples):
            try:
                members = {
                    extension: bytes(sample.payload(extension))
                    for extension in COPIED_EXTENSIONS
                    if sample.has(extension)
                }
                caption = choose_caption(members.get, self._captions)
                image = decode_square(sample, self._size)
            except BadSampleError as error:
                rejected.append(
                    Rejected(key=sample.key, reason=str(error), shard=piece.source.name)
                )
            else:
                keys.append(sample.key)
                pixels.append(image)
                captions.append(caption)
                copied.append(members)
        shape = (len(pixels), self._size, self._size, 3)
        stacked = np.stack(pixels) if pixels else np.zeros(shape, np.uint8)
        return Samples(piece, keys, captions, copied, rejected), torch.from_numpy(stacked)


def decode(
    decoder: Decoder, pieces: Iterator[Piece], workers: int
) -> Generator[tuple[Samples, Tensor], None, None]:
    """Decode pieces in their order, some ahead, across shards.

    Args:
        decoder: Does it.
        pieces: Drawn in this process.
        workers: Processes; 0 decodes in a thread of this one.

    Raises:
        ManifestError: a shard is missing, cut off or replaced.
        ChildProcessError: a worker died.
    """

    def answer(piece: Piece | None) -> tuple[Samples, Tensor] | None:
        return None if piece is None else decoder(piece)

    requests = chain(pieces, repeat(None))  # reading ahead wants requests without end
    if workers:
        answers = with_processes(answer, requests, workers=workers, depth=2 * workers)
    else:
        answers = with_thread(answer, requests, depth=2)
    with closing(answers):
        try:
            for decoded in answers:
                if decoded is None:
                    return
                yield decoded
        except ChildProcessError as error:
            raise ChildProcessError(
                f"precompute.workers: one of {workers} decoding processes died, perhaps for lack "
                "of memory; fewer workers or a smaller precompute.batch_size need less"
            ) from error
