"""What a data set is: the ordered list of its shards, and everything its users must agree on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from data.storage import join, read_bytes, size_bytes, write_atomic

FILE_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
VERSION = 1


class Kind(StrEnum):
    """What the shards hold."""

    images = "images"
    latents = "latents"


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A sample that is left out, and why; an empty key is damage whose owner is unknown."""

    key: str
    reason: str
    shard: str = ""
    """The shard's name, or empty where the sample never got into one."""


def write_ledger(path: Path, rejected: Iterable[Rejected]) -> None:
    """Write one JSON object a line, whole or not at all."""
    lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in rejected)
    write_atomic(path, lines.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One tar of the data set."""

    name: str
    """Relative to the manifest's `base`."""
    samples: int
    size_bytes: int
    sha256: str
    """Of the tar."""
    index_sha256: str
    """Of its offset index."""

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts or not path.parts or ":" in self.name:
            raise ValueError(f"shard name {self.name!r} leads out of the data set")
        if self.samples < 0 or self.size_bytes < 0:
            raise ValueError(f"shard {self.name} has a negative size")

    @property
    def index_name(self) -> str:
        """The offset index, relative to the manifest's folder."""
        return f"{self.name}.index.npy"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterCount:
    """What one of `data.filters` did; a sample counts for the first rule that drops it."""

    rule: str
    """In words."""
    kept: int
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentInfo:
    """Where latents come from, and what they are."""

    source_hash: str
    """Hash of the manifest of the images."""
    encoder: str
    """Fingerprint of the first stage: its weights and architecture."""
    transform: str
    """How an image became the encoder's input, in words that change when it does."""
    shape: list[int]
    """[C, h, w] of the mean; the moments add an axis of 2 in front."""
    mean: list[float]
    """Of each channel, over the whole set."""
    std: list[float]
    """Of each channel, over the whole set."""
    flip: bool = False
    """Whether every sample has the moments of its mirror image, too."""
    text_encoder: str = ""
    """Fingerprint of the text encoder whose output every sample has; empty: none has."""

    @property
    def text(self) -> bool:
        """Whether every sample has a text encoder's output."""
        return bool(self.text_encoder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A data set: shards in order, and what they hold."""

    kind: Kind
    shards: list[Shard]
    image_size: int = 0
    """Side of the square images in pixels; 0: images keep their own sizes."""
    licence: str = ""
    """Terms and attribution of the images."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Samples left out, counted by reason; `rejected.jsonl` lists them."""
    filters: list[FilterCount] = field(default_factory=list)
    """Rules by which sound samples were left out, in their order."""
    downloads: dict[str, int] = field(default_factory=dict)
    """img2dataset's counts of what it tried to fetch, what it got and what failed."""
    source: str = ""
    """Fingerprint of the raw data and options that the shards were made from."""
    base: str = ""
    """Folder or URL of the shards, where they do not lie beside the manifest."""
    latents: LatentInfo | None = None

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def hash(self) -> str:
        """The data set's identity: its kind, shards and latents, wherever they lie."""
        document = asdict(self)
        identity = {name: document[name] for name in ("kind", "shards", "latents")}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path, rejected: Iterable[Rejected] = ()) -> None:
        """Write `rejected.jsonl`, then `manifest.json`, whose presence says that all is there."""
        write_ledger(folder / REJECTED_NAME, rejected)
        document = {"version": VERSION, "hash": self.hash, **asdict(self)}
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        write_atomic(folder / FILE_NAME, text.encode())

    @classmethod
    def load(cls, folder: Path | str, *, option: str, command: str = "") -> "Manifest":
        """Read and check a folder's manifest.

        Args:
            folder: The data set, a path or URL.
            option: The config path that named the folder, for the error.
            command: The command that makes the data set, for the error.

        Raises:
            ManifestError: it is missing, damaged, or of another version.
        """
        path = join(str(folder), FILE_NAME)
        hint = f"; make it with `{command}`" if command else ""
        try:
            document = json.loads(read_bytes(path))
        except FileNotFoundError:
            raise ManifestError(f"{option}: no manifest at {path}{hint}") from None
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{option}: {path} is not JSON ({error}){hint}") from error
        try:
            if not isinstance(document, dict):
                raise ValueError("not a JSON object")
            version, stated = document.pop("version"), document.pop("hash")
            if version != VERSION:
                raise ValueError(f"version {version}, but this program reads {VERSION}")
            manifest = _parse(document)
            if manifest.hash != stated:
                raise ValueError("its hash is not the one it states: it was edited or damaged")
        except KeyError as error:
            raise ManifestError(f"{option}: {path} is damaged: no entry {error}{hint}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ManifestError(f"{option}: {path} is damaged: {error}{hint}") from error
        return manifest


def data_sets(folders: Mapping[str, str]) -> dict[str, str]:
    """Return those of the folders that hold a manifest, by the option that names them.

    Raises:
        ValueError: none does.
    """
    found = {}
    for option, folder in folders.items():
        try:
            size_bytes(join(folder, FILE_NAME))
        except FileNotFoundError:
            continue
        found[option] = folder
    if not found:
        raise ValueError(f"no data set at {', '.join(folders.values())}: run trainer.pack first")
    return found


def _parse(document: dict[str, Any]) -> Manifest:
    """Build a manifest from JSON, checking every entry against the type of its field."""
    latents = document["latents"]
    entries = {
        "kind": Kind(document["kind"]),
        "shards": [_build(Shard, shard) for shard in document["shards"]],
        "filters": [_build(FilterCount, count) for count in document["filters"]],
        "latents": None if latents is None else _build(LatentInfo, latents),
    }
    return _build(Manifest, document | entries)


T = TypeVar("T")


def _build(cls: type[T], entries: dict[str, Any]) -> T:
    hints = get_type_hints(cls)
    if entries.keys() != hints.keys():
        raise ValueError(f"entries missing or unknown: {sorted(entries.keys() ^ hints.keys())}")
    for name, value in entries.items():
        if not _conforms(value, hints[name]):
            raise ValueError(f"{name} is of the wrong type")
    return cls(**entries)


def _conforms(value: object, hint: Any) -> bool:
    arguments = get_args(hint)
    if isinstance(hint, UnionType):
        return any(_conforms(value, alternative) for alternative in arguments)
    if isinstance(value, list) and get_origin(hint) is list:
        return all(_conforms(item, arguments[0]) for item in value)
    if isinstance(value, dict) and get_origin(hint) is dict:
        return all(
            type(key) is str and _conforms(item, arguments[1]) for key, item in value.items()
        )
    return type(value) is hint or (hint is float and type(value) is int)
