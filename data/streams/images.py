"""Make batches of images, decoded in training."""

from typing import Literal, Self

import numpy as np
from typing_extensions import override

from data.config import DataConfig
from data.order.batches import Share
from data.shards.codecs import BadSampleError
from data.shards.manifest import Kind
from data.shards.squares import decode_square
from data.shards.stored import StoredBatch
from data.shards.transforms import Crop
from data.streams.data_set import open_data_set
from data.streams.rows import Rows
from data.streams.stream import IMAGES, NOTHING_DRAWN, Randomness, Stream, Visits


class ImageStream(Stream):
    """Images, decoded in training by data.workers processes; each process makes whole batches."""

    @classmethod
    def open(
        cls,
        config: DataConfig,
        split: Literal["train", "val"],
        share: Share,
        randomness: Randomness = NOTHING_DRAWN,
        *,
        command: str = "",
    ) -> Self:
        """Open data.train or data.val.

        command: command that makes the data sets, for errors.
        Raises: ManifestError where the data set is missing, damaged or of another kind.
        """
        folder, option = (config.train if split == "train" else config.val), f"data.{split}"
        data_set = open_data_set(folder, Kind.images, config, option=option, command=command)
        return cls(data_set, config, share, randomness)

    @property
    @override
    def decodes(self) -> bool:
        return True

    @override
    def _read(self, samples: StoredBatch, visits: Visits) -> Rows:
        side = self.config.image_size
        images = np.empty((len(samples), side, side, 3), np.uint8)
        rows = Rows.empty(samples.keys(), {IMAGES: images}, self.annotations, side)
        for row, stored in enumerate(samples):
            try:
                crop = Crop(*visits.crop[row].tolist())
                found = decode_square(stored, side, self.config.pixels, self.annotations, crop=crop)
                found = found.mirrored() if visits.flip[row] else found
                images[row] = found.pixels
                rows.annotate(row, found.labels, found.boxes)
                rows.captions[row] = self._choose_caption(stored, visits.draw[row])
            except BadSampleError as error:
                rows.reject(row, stored, error)
        return rows
