"""Make batches of latents, from one data set or from a mixture."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from data.config import DataConfig
from data.order.batches import Share
from data.shards.codecs import PLAIN_PIXELS, BadSampleError, decode_npy
from data.shards.manifest import Kind, ManifestError
from data.shards.squares import Square, decode_square
from data.shards.stored import ArrayLayout, StoredBatch, StoredSample, Texts
from data.streams.buffers import Buffers
from data.streams.data_set import OpenDataSet, open_data_set, open_mixture
from data.streams.rows import Rows
from data.streams.stream import (
    IMAGES,
    NOTHING_DRAWN,
    Randomness,
    Stream,
    Visits,
    no_problem,
)

NO_PIXELS = np.empty((0, 0, 3), np.uint8)
"""Stands for an image that is not asked for."""


class ArrayMember(NamedTuple):
    """An array of every sample, stored as NAME.npy."""

    name: str
    """Name of the array, in samples and in batches."""
    layout: ArrayLayout
    mirrored: bool = False
    """Whether mirrored visits read flip.NAME.npy instead."""
    of_captions: bool = False
    """Whether a sample has an array for each of its captions: the layout is that of one."""

    def extension(self, flip: bool) -> str:
        """Return the extension of the stored array."""
        return f"flip.{self.name}.npy" if flip and self.mirrored else f"{self.name}.npy"


class LatentStream(Stream):
    """Latents of trainer.precompute, read from shards by one thread.

    members: the arrays of a sample.
    """

    def __init__(
        self,
        data_set: OpenDataSet,
        config: DataConfig,
        share: Share,
        randomness: Randomness,
        members: Sequence[ArrayMember],
    ) -> None:
        super().__init__(data_set, config, share, randomness)
        self._members = members
        self._buffers = {
            member.name: Buffers((share.micro_batch, *member.layout.shape), member.layout.dtype)
            for member in members
        }

    @classmethod
    def open(
        cls,
        config: DataConfig,
        share: Share,
        randomness: Randomness = NOTHING_DRAWN,
        *,
        command: str = "",
    ) -> Self:
        """Open the sets of data.mixture or, if there are none, data.latents.

        command: command that makes the data sets, for errors.
        Raises: ManifestError where a data set is missing, damaged or of another kind; ValueError
        where its samples lack mirrored latents or text embeddings that the config needs.
        """
        if config.mixture:
            data_set = open_mixture(config, command=command)
        else:
            data_set = open_data_set(
                config.latents, Kind.latents, config, option="data.latents", command=command
            )
        members = _find_members(data_set, config, flip=randomness.flip is not None)
        return cls(data_set, config, share, randomness, members=members)

    @property
    @override
    def decodes(self) -> bool:
        return self.config.store_images or self.annotations.maps

    @override
    def _read(self, samples: StoredBatch, visits: Visits) -> Rows:
        """Read the samples of the common layout together, then the others one by one."""
        arrays: dict[str, np.ndarray] = {}
        texts = samples.texts("txt", "cls")
        together = not any(member.of_captions for member in self._members)
        sound = np.full(len(samples), together)
        for member in self._members:
            places = samples.members(member.extension(flip=False))
            if member.mirrored and visits.flip.any():
                mirrored = samples.members(member.extension(flip=True))
                places[visits.flip] = mirrored[visits.flip]
            arrays[member.name] = self._buffers[member.name].take(len(samples))
            if together:
                sound &= samples.copy(places, member.layout, arrays[member.name], texts)
        captions, readable = self._captions(samples, texts, visits.draw)
        rows = Rows.empty(samples.keys(), arrays, self.annotations, self.manifest.image_size)
        rows.captions = captions
        for row in np.flatnonzero(~(sound & readable)).tolist():
            try:
                self._read_row(rows, row, samples[row], visits)
            except BadSampleError as error:
                rows.reject(row, samples[row], error)
        if self.config.store_images or self.annotations.members:
            self._decode(rows, samples, visits)
        return rows

    def _decode(self, rows: Rows, samples: StoredBatch, visits: Visits) -> None:
        """Decode what lies beside the latents of the good rows, stored in one size."""
        side = self.manifest.image_size
        if self.config.store_images:
            rows.arrays[IMAGES] = np.empty((len(samples), side, side, 3), np.uint8)
        for row, stored in enumerate(samples):
            if row in rows.bad:
                continue
            try:
                found = self._square(stored, side)
            except BadSampleError as error:
                rows.reject(row, stored, error)
                continue
            found = found.mirrored() if visits.flip[row] else found
            if self.config.store_images:
                rows.arrays[IMAGES][row] = found.pixels
            rows.annotate(row, found.labels, found.boxes)

    def _square(self, stored: StoredSample, side: int) -> Square:
        """Raises: BadSampleError where the image or an annotation is missing or damaged."""
        rule = self.annotations
        if self.config.store_images:
            return decode_square(stored, side, PLAIN_PIXELS, rule)
        labels = rule.read_map(stored.member, (side, side)) if rule.maps else None
        boxes = rule.read_boxes(stored.member) if rule.boxes else []
        return Square(NO_PIXELS, labels, boxes)

    def _read_row(self, rows: Rows, row: int, stored: StoredSample, visits: Visits) -> None:
        """Decode one sample with the slower general decoders, whose errors name the problem.

        Raises: BadSampleError where a member is missing, damaged or of another layout.
        """
        captions, place = self._draw_caption(stored, visits.draw[row])
        for member in self._members:
            array = decode_npy(stored.payload(member.extension(bool(visits.flip[row]))))
            if member.of_captions:
                if array.ndim != len(member.layout.shape) + 1 or len(array) != len(captions):
                    raise BadSampleError(f"{member.name} {array.shape} of {len(captions)} captions")
                array = array[place]
            if (array.dtype, array.shape) != (member.layout.dtype, member.layout.shape):
                raise BadSampleError(f"{member.name} of {array.dtype} {array.shape}")
            rows.arrays[member.name][row] = array
        rows.captions[row] = captions[place]

    def _captions(
        self, samples: StoredBatch, texts: Texts, draws: np.ndarray
    ) -> tuple[list[str], NDArray[np.bool_]]:
        """Return the captions [B], and whether each could be read: [B] bool."""
        if all(rule.is_plain for rule in self.data_set.caption_rules):
            captions, sound = texts.decode()
            if self.caption_problem is not no_problem:
                sound &= [not self.caption_problem(caption) for caption in captions]
            return captions, sound
        captions, sound = [""] * len(samples), np.zeros(len(samples), bool)
        for row, (stored, draw) in enumerate(zip(samples, draws.tolist(), strict=True)):
            with suppress(BadSampleError):
                captions[row] = self._choose_caption(stored, draw)
                sound[row] = True
        return captions, sound


def _find_members(data_set: OpenDataSet, config: DataConfig, *, flip: bool) -> list[ArrayMember]:
    """Return the arrays that a config trains on.

    flip: whether some visits are mirrored.
    Raises: ManifestError or ValueError where the data set lacks an array.
    """
    info, option, command = data_set.manifest.latents, data_set.option, data_set.command
    if info is None:
        raise ManifestError(f"{option}: the manifest describes no latents")
    if flip and not info.flip:
        raise ValueError(
            f"data.flip: {option} has no mirrored latents; set data.flip=false, or delete the "
            f"shards and run `{command}` again"
        )
    if config.store_images and not info.images:
        raise ValueError(
            f"data.store_images: {option} has no images beside its latents; delete the shards and "
            f"run `{command}` again"
        )
    members = [ArrayMember("moments", ArrayLayout.of(np.float16, (2, *info.shape)), mirrored=True)]
    if config.store_text:
        if not info.text:
            raise ValueError(
                f"data.store_text: {option} has no text embeddings; set data.store_text=false, or "
                f"delete the shards and run `{command}` again"
            )
        several = {rule.several for rule in data_set.caption_rules}
        if several != {info.captions}:
            raise ValueError(
                f"data.captions: {option} has text of {info.captions or 'one caption'}, not of "
                f"{' or '.join(several) or 'one caption'}; set data.store_text=false, or delete "
                f"the shards and run `{command}` again"
            )
        layout = _find_layout(data_set, "text", dimensions=3 if info.captions else 2)
        if info.captions:
            layout = ArrayLayout.of(layout.dtype, layout.shape[1:])
        members.append(ArrayMember("text", layout, of_captions=bool(info.captions)))
    return members


def _find_layout(data_set: OpenDataSet, name: str, *, dimensions: int) -> ArrayLayout:
    """Return the layout of the first readable array of a name, in float16.

    Raises: ValueError where no sample has such an array.
    """
    for number in range(data_set.manifest.samples):
        (stored,) = data_set.reader.find(np.array([number]))
        with suppress(BadSampleError):
            array = decode_npy(stored.payload(f"{name}.npy"))
            if array.dtype == np.float16 and array.ndim == dimensions:
                return ArrayLayout.of(array.dtype, array.shape)
    raise ValueError(
        f"{data_set.option}: no sample has a {name}.npy of float16 with {dimensions} dimensions"
    )
