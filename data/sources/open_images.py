"""Read boxes from the tables of Open Images.

Source: Kuznetsova et al. 2020, "The Open Images Dataset V4", and the format page of the data set:
`*-annotations-bbox.csv` (ImageID, LabelName, XMin, XMax, YMin, YMax, …) and
`*class-descriptions*.csv` (LabelName, DisplayName), in the folder of the images or in its folder
`annotations`. An image is named by its ImageID.
"""

import csv
import io
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO

from data.shards.annotations import Box

BOXES, CLASSES = "*-annotations-bbox.csv", "*class-descriptions*.csv"
FOLDER = "annotations"
CORNERS = ("XMin", "YMin", "XMax", "YMax")
_RECORD = struct.Struct("<I4d")
"""Number of a label and four corners: the 15 million boxes of the training set take 0.5 GB."""


class BoxTable:
    """The boxes of images, by the paths of the images; a label is its display name."""

    def __init__(self) -> None:
        self.others: list[str] = []
        """Tables that describe none of the images."""
        self.labels: list[str] = []
        """Display names of all classes; empty without a table of them."""
        self._names: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._boxes: dict[str, bytearray] = defaultdict(bytearray)

    def __contains__(self, image: str) -> bool:
        return image in self._boxes

    def of(self, image: str) -> list[Box]:
        """Return the boxes of an image."""
        labels = [self._names.get(name, name) for name in self._numbers]
        records = _RECORD.iter_unpack(self._boxes[image])
        return [Box(labels[number], *corners) for number, *corners in records]

    def add_classes(self, rows: Iterable[Sequence[str]]) -> None:
        """Add rows of (LabelName, DisplayName); the first may be the names of the columns."""
        for row in rows:
            if row[0] != "LabelName":
                self._names[row[0]] = row[1]
        self.labels = list(dict.fromkeys(self._names.values()))

    def add_boxes(self, rows: Iterator[Sequence[str]], images: dict[str, str]) -> bool:
        """Add rows of boxes, the names of the columns first; say whether one is of these images.

        images: ImageID → path.
        """
        columns = list(next(rows))
        image, label, *corners = map(columns.index, ("ImageID", "LabelName", *CORNERS))
        used = False
        for row in rows:
            path = images.get(row[image])
            if path is not None:
                number = self._numbers.setdefault(row[label], len(self._numbers))
                values = [float(row[corner]) for corner in corners]
                self._boxes[path] += _RECORD.pack(number, *values)
                used = True
        return used


def is_box_table(name: str) -> bool:
    """Say whether a file of a folder of images, by its relative path, is a table of Open Images."""
    path = PurePosixPath(name)
    known = path.match(BOXES) or path.match(CLASSES)
    return known and path.parent.as_posix() in (".", FOLDER)


def read_boxes(
    open_table: Callable[[str], BinaryIO], place: str, files: Iterable[str], images: Iterable[str]
) -> BoxTable:
    """Read the tables of a folder.

    open_table: opens one by its path. place: the folder, for errors. files: relative paths of the
    tables. images: relative paths of the images, in any folder.
    Raises: ValueError where a table is damaged.
    """
    paths = {PurePosixPath(image).stem: image for image in images}
    table = BoxTable()
    for name in files:
        with open_table(name) as file:
            rows = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""))
            try:
                if PurePosixPath(name).match(CLASSES):
                    table.add_classes(rows)
                elif not table.add_boxes(rows, paths):
                    table.others.append(name)
            except (csv.Error, IndexError, StopIteration, ValueError) as error:
                raise ValueError(f"{place}/{name}: no table of Open Images ({error})") from error
    return table
