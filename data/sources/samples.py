"""What a source of raw images gives: samples, and reasons for what it leaves out."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from data.shards.account import Tally
from data.shards.annotations import Labels
from data.shards.manifest import Rejected

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class RawSample:
    """An image with its caption; the image has been decoded once without an error."""

    name: str
    """Path or file name of the image, unique within the source."""
    draw: float
    """From [0, 1); a sample below data.source.val_share is for validation."""
    extension: str
    """Format of the image, such as `png`."""
    image: bytes
    """The encoded image."""
    caption: str
    width: int
    """[pixels] of the upright image."""
    height: int
    """[pixels] of the upright image."""
    label: int | None = None
    """Number of its class in `Source.classes`."""
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """Other fields of the sample, for its JSON."""
    annotations: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """Members with a label map and boxes; see data/shards/annotations.py."""
    noted: Counter[str] = field(default_factory=Counter[str])
    """Remarks on the sample, which is taken all the same; see `Manifest.noted`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotChosen:
    """A sample that the source's options leave out."""

    key: str
    reason: str


Item = RawSample | Rejected | NotChosen


class Source(Protocol):
    """An iterable of everything that a source holds, always in the same order."""

    licence: str
    """Terms and attribution of the images."""
    image_size: int
    """[pixels] Side of every image; 0: images keep their own sizes."""
    left_alone: Tally
    """Files that are no samples."""

    labels: Labels
    """Names of the classes of maps and boxes, where the source states them."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by number; empty: the samples have none."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the samples."""
        ...

    def former_fingerprint(self) -> str:
        """Return the hash that 0.1.0 wrote to manifests; most have not changed since."""
        return self.fingerprint()

    @property
    def images(self) -> int:
        """Number of images that are read; what is lost without a look is not counted."""
        ...

    def sample(self, number: int) -> Iterator[Item]:
        """Yield about `number` of the items that `images` counts, spread over the source."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


def hash_share(text: str) -> float:
    """Map a text to a number in [0, 1) by its SHA-256: uniform, and the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def spread(items: Sequence[T], number: int) -> Sequence[T]:
    """Return about `number` of the items, spread evenly; all if there are no more."""
    return items[:: max(1, len(items) // number)]
