"""Read image shards: pixels for the encoder, and members that a latent shard copies."""

from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.read_ahead import with_processes, with_thread
from data.shards.annotations import encode_boxes, encode_map
from data.shards.captions import CaptionRule, read_captions
from data.shards.codecs import BOXES, CAPTION_EXTENSIONS, MAP, BadSampleError, encode_png
from data.shards.manifest import Manifest, Rejected, Shard
from data.shards.reader import ShardReader
from data.shards.squares import decode_square
from data.streams.data_set import annotation_rule
from trainer.config import Config

IMAGE = "png"
"""Extension of an image that is stored beside its latents."""
COPIED_EXTENSIONS = (*CAPTION_EXTENSIONS, "json")
"""Annotations are not copied: they are cropped with the image."""


class Piece(NamedTuple):
    """A batch: samples of one shard that are decoded, encoded and written together.

    It depends on the shard alone, because a network may round a sample differently in another
    batch.
    """

    source: Shard
    samples: NDArray[np.int64]
    """Their numbers in the order of the manifest: [B] int64."""
    last: bool
    """Whether this is the last piece of the shard."""


class Samples(NamedTuple):
    """The good samples of a piece without their pixels, and its rejected samples."""

    piece: Piece
    keys: list[str]
    captions: list[list[str]]
    """All captions of each good sample."""
    copied: list[dict[str, bytes]]
    """Members of each good sample beside its latents: captions, metadata, cropped annotations and
    image."""
    rejected: list[Rejected]
    noted: Counter[str]
    """See `Manifest.noted`."""


class Decoder:
    """Decodes images, and crops and resizes them to data.image_size."""

    def __init__(self, config: Config, images: Manifest) -> None:
        self._size, self._data = config.data.image_size, config.data
        self._rule = CaptionRule.of(config.data)
        self._annotations = annotation_rule(config.data, images, "data.train")
        self._reader = ShardReader(
            config.data.train, images, config.data.cache, source=config.data.source.path
        )

    def __call__(self, piece: Piece) -> tuple[Samples, Tensor]:
        """Decode a piece; return its samples, and pixels of the good ones [B, S, S, 3] uint8.

        Raises: ManifestError if the shard is missing, cut off or replaced.
        """
        samples = Samples(piece, [], [], [], [], Counter())
        pixels: list[NDArray[np.uint8]] = []
        for sample in self._reader.find(piece.samples):
            try:
                members = {
                    extension: bytes(sample.payload(extension))
                    for extension in COPIED_EXTENSIONS
                    if sample.has(extension)
                }
                captions = read_captions(members.get, self._rule, samples.noted)
                image = decode_square(
                    sample,
                    self._size,
                    self._data.pixels,
                    self._annotations,
                    noted=samples.noted,
                )
            except BadSampleError as error:
                samples.rejected.append(sample.rejected(error))
            else:
                samples.keys.append(sample.key)
                pixels.append(image.pixels)
                if self._data.store_images:
                    members[IMAGE] = encode_png(Image.fromarray(image.pixels))
                if image.labels is not None:
                    members[MAP] = encode_map(image.labels)
                if self._annotations.boxes:
                    members[BOXES] = encode_boxes(image.boxes)
                samples.captions.append(captions.texts)
                samples.copied.append(members)
        shape = (len(pixels), self._size, self._size, 3)
        stacked = np.stack(pixels) if pixels else np.zeros(shape, np.uint8)
        return samples, torch.as_tensor(stacked)


def decode(
    decoder: Decoder, pieces: Iterator[Piece], workers: int
) -> Generator[tuple[Samples, Tensor], None, None]:
    """Decode pieces ahead; yield the results in the order of the pieces.

    pieces: iterated in this process. workers: number of processes; 0 decodes in a thread.
    Raises: ManifestError if a shard is missing, cut off or replaced; ChildProcessError if a worker
    died.
    """

    def answer(piece: Piece | None) -> tuple[Samples, Tensor] | None:
        return None if piece is None else decoder(piece)

    requests = chain(pieces, repeat(None))  # reading ahead needs an endless iterator
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
