"""The values of samples that a stream has read, before they are a batch."""

from dataclasses import dataclass

import numpy as np

from data.shards.annotations import AnnotationRule, Box
from data.shards.codecs import BadSampleError
from data.shards.manifest import Rejected
from data.shards.stored import StoredSample

MAP_ARRAY = "map"
"""Name of the label maps in batches."""


@dataclass(slots=True, kw_only=True)
class Rows:
    """The values of B samples; the rows of bad samples are undefined."""

    keys: list[str]
    captions: list[str]
    arrays: dict[str, np.ndarray]
    """[B, ...] of the stored data type."""
    bad: dict[int, Rejected]
    """Number of a row → its bad sample."""
    boxes: list[list[Box]]
    """[B]; empty where none are asked for."""

    @classmethod
    def empty(
        cls, keys: list[str], arrays: dict[str, np.ndarray], rule: AnnotationRule, side: int
    ) -> "Rows":
        """Make rows for samples, with places for the annotations of a rule.

        side: of the label maps, in pixels.
        """
        if rule.maps:
            arrays[MAP_ARRAY] = np.empty((len(keys), side, side), np.uint8)
        boxes = [list[Box]() for _ in keys] if rule.boxes else []
        return cls(keys=keys, captions=[""] * len(keys), arrays=arrays, bad={}, boxes=boxes)

    def annotate(self, row: int, labels: np.ndarray | None, boxes: list[Box]) -> None:
        """Put the annotations of a sample into its row; labels: [S, S] uint8."""
        if labels is not None:
            self.arrays[MAP_ARRAY][row] = labels
        if self.boxes:
            self.boxes[row] = boxes

    def reject(self, row: int, stored: StoredSample, error: BadSampleError) -> None:
        """Mark a row as bad."""
        self.bad[row] = stored.rejected(error)

    def take(self, rows: list[int]) -> "Rows":
        """Copy some of the rows; all of them must be good."""
        return Rows(
            keys=[self.keys[row] for row in rows],
            captions=[self.captions[row] for row in rows],
            arrays={name: array[rows] for name, array in self.arrays.items()},
            bad={},
            boxes=[self.boxes[row] for row in rows] if self.boxes else [],
        )

    def replace(self, row: int, other: "Rows") -> None:
        """Copy the only sample of `other` to a row."""
        self.keys[row], self.captions[row] = other.keys[0], other.captions[0]
        for name, array in self.arrays.items():
            array[row] = other.arrays[name][0]
        if self.boxes:
            self.boxes[row] = other.boxes[0]
