"""Label maps and boxes beside images: the members `map.png` and `boxes.json` of a sample.

A label map is a PNG of mode L or P of the size of its upright image: a class number for each pixel.
The boxes are a list of `{"label": name, "box": [left, top, right, bottom]}`, in parts of the width
and of the height of the image.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.config import DataConfig
from data.shards.captions import Member
from data.shards.codecs import (
    BOXES,
    IMAGE_EXTENSIONS,
    MAP,
    BadSampleError,
    Buffer,
    decode_json,
    decode_plain,
    encode_png,
    image_size,
    is_json_array,
    is_json_object,
)
from data.shards.index import member_of
from data.shards.manifest import Rejected
from data.storage.local_file import Content
from data.storage.untrusted import read_text
from data.text import printable

MAX_MAP_CLASSES = 256
MAX_NAMES_BYTES = 2**20
ROUNDING = 1e-3
"""Part of a side by which a box may pass the edge; it is clipped. Files round to whole pixels."""


class Box(NamedTuple):
    """A labelled rectangle, in parts of the width and of the height of its image."""

    label: str
    """Name of its class."""
    left: float
    top: float
    right: float
    bottom: float

    def mirrored(self) -> "Box":
        """Return the box of the mirror image, left to right."""
        return self._replace(left=1.0 - self.right, right=1.0 - self.left)

    def scaled(self, x: float, y: float) -> "Box":
        """Return the box with its corners times x across and times y down."""
        return Box(self.label, self.left * x, self.top * y, self.right * x, self.bottom * y)

    def in_crop(self, crop: Sequence[float]) -> "Box | None":
        """Return the box in parts of a crop, clipped to it; None if nothing of it is inside.

        crop: left, top, right and bottom, in parts of the image.
        """
        width, height = crop[2] - crop[0], crop[3] - crop[1]
        box = Box(
            self.label,
            min(max((self.left - crop[0]) / width, 0.0), 1.0),
            min(max((self.top - crop[1]) / height, 0.0), 1.0),
            min(max((self.right - crop[0]) / width, 0.0), 1.0),
            min(max((self.bottom - crop[1]) / height, 0.0), 1.0),
        )
        return box if box.left < box.right and box.top < box.bottom else None


class Labels(NamedTuple):
    """The names of classes."""

    maps: Sequence[str] = ()
    """Of label maps, by number."""
    boxes: Sequence[str] = ()


NO_LABELS = Labels()


@dataclass(slots=True)
class Found:
    """The classes that the annotations of a data set have."""

    boxes: set[str] = field(default_factory=set[str])
    maps: int = 0
    """One more than the largest number in a label map."""

    def add(self, boxes: Iterable[str], maps: int) -> None:
        """Add classes of other samples."""
        self.boxes.update(boxes)
        self.maps = max(self.maps, maps)


@dataclass(frozen=True)
class AnnotationRule:
    """Which annotations every sample must have, and the classes that they may name."""

    maps: bool = False
    boxes: bool = False
    labels: Labels = NO_LABELS
    """Names of all classes; empty: any label, and any number, is a class."""

    @classmethod
    def of(cls, config: DataConfig, known: Labels = NO_LABELS) -> Self:
        """Return the rule of a config.

        known: classes that the source names, unless data.source.map_classes or
        data.source.box_classes name a file. Raises: as `read_names`.
        """
        source = config.source
        maps = _names("map_classes", source.map_classes) if config.maps else ()
        boxes = _names("box_classes", source.box_classes) if config.boxes else ()
        if len(maps) > MAX_MAP_CLASSES:
            raise ValueError(
                f"data.source.map_classes: {len(maps)} classes, but a map of 8 bits has "
                f"{MAX_MAP_CLASSES}"
            )
        labels = Labels(tuple(maps or known.maps), tuple(boxes or known.boxes))
        return cls(config.maps, config.boxes, labels)

    @property
    def members(self) -> list[str]:
        """Extensions of the members that every sample must have."""
        return [MAP] * self.maps + [BOXES] * self.boxes

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.labels.boxes)

    def check(self, member: Member, size: Callable[[], tuple[int, int]], found: Found) -> None:
        """Check the annotations of a sample, and add their classes to `found`.

        size: returns (width, height) of the upright image.
        Raises: BadSampleError where one is missing, damaged, of another size, or names a class that
        is not known; also that of `size`.
        """
        labels = list[str]()
        maps = 0
        if self.boxes:
            labels = [box.label for box in self.read_boxes(member)]
        if self.maps:
            maps = int(self.read_map(member, size()).max(initial=0)) + 1
        found.add(labels, maps)

    def read_map(self, member: Member, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Decode the label map of a sample: [H, W] uint8.

        size: (width, height) of its image. Raises: BadSampleError as `check`.
        """
        labels = decode_map(_payload(member, MAP), size)
        if self.labels.maps and (most := int(labels.max(initial=0))) >= len(self.labels.maps):
            raise BadSampleError(f"label {most} in .{MAP}: the classes are 0 to {self._last}")
        return labels

    @property
    def _last(self) -> int:
        return len(self.labels.maps) - 1

    def read_boxes(self, member: Member) -> list[Box]:
        """Decode the boxes of a sample. Raises: BadSampleError as `check`."""
        boxes = decode_boxes(_payload(member, BOXES))
        for box in boxes:
            if self._known and box.label not in self._known:
                raise BadSampleError(f"label {printable(box.label)!r} in .{BOXES} is no class")
        return boxes

    def named(self, found: Found) -> Labels:
        """Return the names of all classes: those that are known, or those that were found."""
        maps = self.labels.maps or [str(number) for number in range(found.maps)]
        boxes = self.labels.boxes or sorted(found.boxes)
        return Labels(maps if self.maps else (), boxes if self.boxes else ())


NO_ANNOTATIONS = AnnotationRule()


def check_samples(
    content: Content, index: NDArray[np.void], rule: AnnotationRule
) -> tuple[NDArray[np.void], list[Rejected], Found]:
    """Check the annotations of all samples of a shard: (index of the good ones, the bad, classes).

    content, index: of the shard.
    """
    found, rejected = Found(), list[Rejected]()
    if not rule.members:
        return index, rejected, found
    good = np.ones(len(index), bool)
    for number, sample in enumerate(index):
        member = partial(member_of, content, sample)
        try:
            rule.check(member, partial(_image_size, member), found)
        except BadSampleError as error:
            good[number] = False
            rejected.append(Rejected(key=sample["key"].decode(), reason=str(error)))
    return index[good], rejected, found


def _image_size(member: Member) -> tuple[int, int]:
    payloads = (member(extension) for extension in IMAGE_EXTENSIONS)
    return image_size(next(payload for payload in payloads if payload is not None))


def read_names(path: Path) -> list[str]:
    """Read the names of classes, one a line; a line's place is the number of its class.

    Raises: ValueError where a name is empty or stands there twice; OSError where the file cannot be
    read, or is over MAX_NAMES_BYTES.
    """
    names: dict[str, None] = {}
    for number, line in enumerate(read_text(path, limit=MAX_NAMES_BYTES).splitlines(), start=1):
        name = line.strip()
        if not name or name in names:
            raise ValueError(f"{path}: line {number} is {'a repeated' if name else 'no'} name")
        names[name] = None
    return list(names)


def _names(option: str, path: str) -> list[str]:
    try:
        return read_names(Path(path)) if path else []
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.source.{option}: no file at {path!r}") from error
    except ValueError as error:
        raise ValueError(f"data.source.{option}: {error}") from error


def _payload(member: Member, extension: str) -> Buffer:
    payload = member(extension)
    if payload is None:
        raise BadSampleError(f"no .{extension}")
    return payload


def decode_map(payload: Buffer, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode a label map: [H, W] uint8.

    size: (width, height) that it must have.
    Raises: BadSampleError where it has another size or mode, is damaged, or is no PNG.
    """
    try:
        image = decode_plain(payload, "L", "P")
    except BadSampleError as error:
        raise BadSampleError(f".{MAP}: {error}") from error
    if image.size != size:
        (width, height), (w, h) = image.size, size
        raise BadSampleError(f".{MAP} of {width}x{height} beside an image of {w}x{h}")
    return np.asarray(image, np.uint8)


def encode_map(labels: NDArray[np.uint8]) -> bytes:
    """Encode a label map [H, W] as PNG of mode L."""
    return encode_png(Image.fromarray(labels))


def decode_boxes(payload: Buffer) -> list[Box]:
    """Decode boxes; those that pass an edge by ROUNDING or less are clipped.

    Raises: BadSampleError where the payload is no such list, or a box lies outside of the image or
    has no area.
    """
    try:
        document = decode_json(payload)
    except BadSampleError as error:
        raise BadSampleError(f".{BOXES}: {error}") from error
    if not is_json_array(document):
        raise BadSampleError(f".{BOXES} is not a list")
    return [_box(entry) for entry in document]


def _box(entry: object) -> Box:
    label: Any = entry.get("label") if is_json_object(entry) else None
    corners: Any = entry.get("box") if is_json_object(entry) else None
    if not isinstance(label, str) or not label or not is_json_array(corners) or len(corners) != 4:
        raise BadSampleError(f".{BOXES} has an entry without `label` and `box` of four numbers")
    numbers = [value for value in corners if type(value) in (int, float)]
    if sum(-ROUNDING <= value <= 1 + ROUNDING for value in numbers) < 4:
        raise BadSampleError(f"a box of {printable(label)!r} is outside of [0, 1] in .{BOXES}")
    box = Box(label, *(min(max(float(value), 0.0), 1.0) for value in numbers))
    if box.left >= box.right or box.top >= box.bottom:
        raise BadSampleError(f"a box of {printable(label)!r} has no area in .{BOXES}")
    return box


def encode_boxes(boxes: Iterable[Box]) -> bytes:
    """Encode boxes as JSON."""
    entries = [{"label": label, "box": corners} for label, *corners in boxes]
    return json.dumps(entries, ensure_ascii=False).encode()
