"""The manifest of a data set: the ordered list of its shards, and their description."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls

from data.secrets import redact, restore
from data.shards.account import SAMPLES, Fate, LeftOut, total
from data.storage.atomic import write_atomic
from data.storage.documents import is_json_array, is_json_object, parse_json
from data.storage.files import join_location, lies_in, read_bytes, size_bytes
from data.text import printable

FILE_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
VERSION = 1
MAX_BYTES = 2**27
"""Largest manifest that is read: about 300,000 shards."""
MAX_SHARD_SAMPLES, MAX_SHARD_BYTES = 2**40, 2**60
MAX_LATENT_VALUES = 2**26
"""Largest number of values of one latent: four channels of 4096 x 4096."""
MAX_STATISTIC = 1e6
"""Largest mean and standard deviation of latents; the inverse is the smallest deviation."""

ANNOTATED = ("map_classes", "box_classes")
"""Entries of manifests whose samples have annotations; others lack them."""
LATER_ENTRIES: dict[str, Any] = {"noted": {}, "classes": [], "map_classes": [], "box_classes": []}
"""Entries that manifests of 0.1.0 lack, empty."""

Ids = NDArray[np.int64]
"""Numbers of samples or of shards, in the order of a manifest."""


class Kind(StrEnum):
    """Kinds of shards, by their content."""

    images = "images"
    latents = "latents"


class ManifestError(ValueError):
    """The error of a manifest that cannot be used; the message names the file."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A sample that is left out, with the reason."""

    key: str
    """Empty for damage that belongs to no known sample."""
    reason: str
    shard: str = ""
    """Name of the shard; empty for a raw sample that is in none."""

    def __str__(self) -> str:
        return f"{printable(self.key)} in {printable(self.shard)}: {printable(self.reason)}"


def encode_ledger(rejected: Iterable[Rejected]) -> bytes:
    r"""Encode a list of rejected samples, one JSON object a line.

    Halves of surrogate pairs stay escaped, `\ud800`.
    """
    lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in rejected)
    return lines.encode(errors="backslashreplace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One tar of the data set.

    Raises: ValueError where the name leads out of the data set, or a size cannot be right.
    """

    name: str
    """Path of the tar, relative to the manifest's `base`."""
    samples: int
    """Number of sound samples."""
    size_bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the tar."""
    index_sha256: str
    """Hash of the offset index."""

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts or not path.parts or ":" in self.name:
            raise ValueError(f"shard name {self.name!r} leads out of the data set")
        if self.samples < 0 or self.size_bytes < 0:
            raise ValueError(f"shard {self.name} has a negative size")
        if self.samples > MAX_SHARD_SAMPLES or self.size_bytes > MAX_SHARD_BYTES:
            raise ValueError(f"shard {self.name} has more samples or bytes than any disk holds")

    @property
    def index_name(self) -> str:
        """Path of the offset index, relative to the manifest's folder."""
        return f"{self.name}.index.npy"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterCount:
    """The counts of one of `data.filters`; a sample counts for the first rule that drops it."""

    rule: str
    """Description of the rule in words."""
    kept: int
    """Number of samples that this rule and those before it kept."""
    dropped: int
    """Number of samples that this rule was the first to drop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentInfo:
    """The origin, layout and statistics of latents."""

    source_hash: str
    """Hash of the manifest of the images."""
    encoder: str
    """Fingerprint of the first stage: its weights and architecture."""
    transform: str
    """Description of the image transform before the encoder; another transform has another one."""
    shape: list[int]
    """[C, h, w] of the mean; the stored moments are [2, C, h, w]."""
    mean: list[float]
    """[C], mean of each channel over the whole set."""
    std: list[float]
    """[C], standard deviation of each channel over the whole set."""
    flip: bool = False
    """Whether every sample also has the moments of its mirror image."""
    text_encoder: str = ""
    """Fingerprint of the text encoder whose output every sample has; empty: none has."""
    captions: str = ""
    """`CaptionRule.several` of the stored text: it is [captions, T, D]; empty: of one, [T, D]."""
    images: bool = False
    """Whether every sample also has its image, cropped and resized."""

    @property
    def text(self) -> bool:
        """Whether every sample has a text encoder's output."""
        return bool(self.text_encoder)


LATER: dict[str, object] = {"captions": "", "images": False}
"""Entries of `LatentInfo` that 0.1.0 did not write, and what they would have been."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A data set: its shards in order, and their description."""

    kind: Kind
    shards: list[Shard]
    image_size: int = 0
    """[pixels] Side of the square images; 0: images keep their own sizes."""
    licence: str = ""
    """Terms and attribution of the images."""
    rejected: dict[str, int] = field(default_factory=dict[str, int])
    """Number of samples left out, by reason; `rejected.jsonl` lists them."""
    noted: dict[str, int] = field(default_factory=dict[str, int])
    """Number of samples that were taken with a remark, by remark."""
    filters: list[FilterCount] = field(default_factory=list[FilterCount])
    """Counts of the filters, in their order."""
    left_out: list[LeftOut] = field(default_factory=list[LeftOut])
    """Everything that was found and is in no shard, by reason, with examples."""
    classes: list[str] = field(default_factory=list[str])
    """Names of the classes, by number; empty: the samples have none, or classes without names."""
    map_classes: list[str] = field(default_factory=list[str])
    """Names of the classes of the label maps, by number; empty: the samples have no maps."""
    box_classes: list[str] = field(default_factory=list[str])
    """Labels of the boxes; empty: the samples have none."""
    downloads: dict[str, int] = field(default_factory=dict[str, int])
    """img2dataset's counts of images tried, fetched and failed."""
    source: str = ""
    """The raw data and the options that the shards were made from; see trainer/pack/origin.py."""
    base: str = ""
    """Folder or URL of the shards; empty: the manifest's folder."""
    latents: LatentInfo | None = None
    """Description of latents; None for images."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def facts(self) -> dict[str, Any]:
        """What a run keeps of the data set, as JSON values."""
        names = ("left_out", "noted", "classes")
        document = self._document()
        account = {name: document[name] for name in (*names, *ANNOTATED) if name in document}
        return {"found": self.found, "samples": self.samples, **account}

    def _document(self) -> dict[str, Any]:
        """Return the entries; those of annotations only where there are some."""
        document = asdict(self)
        return {name: value for name, value in document.items() if value or name not in ANNOTATED}

    @property
    def found(self) -> int:
        """Number of samples that the source holds: in shards, rejected, filtered, not chosen."""
        return self.samples + total(self.left_out, *SAMPLES)

    @property
    def shard_sizes(self) -> Ids:
        """Number of samples in each shard: [shards] int64."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def hash(self) -> str:
        """Identity of the data set: the SHA-256 of its kind, shards and latents, at any place."""
        document = asdict(self)
        identity = {name: document[name] for name in ("kind", "shards", "latents")}
        for name in LATER:
            if self.latents is not None and not getattr(self.latents, name):
                del identity["latents"][name]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def shards_at(self, folder: str, source: str) -> str:
        """Return the folder or URL of the shards.

        A manifest comes with its data, perhaps from a stranger. It alone cannot send this program
        to another folder or host: an option of this user must name that place, too.
        folder: path or URL of the manifest's folder. source: data.source.path.
        Raises: ManifestError where the shards lie elsewhere and `source` does not name the place.
        """
        if not self.base:
            return folder
        places = {folder, *expand_urls(source)} if source else {folder}
        for shard in self.shards:
            if not lies_in(join_location(self.base, shard.name), places):
                raise ManifestError(
                    f"data.source.path: the manifest in {folder} leads to {shard.name} in "
                    f"{self.base}, which this option does not name; if you trust that place, set it"
                )
        return self.base

    def save(self, folder: Path, rejected: Iterable[Rejected] = ()) -> None:
        """Write `rejected.jsonl`, then `manifest.json`: its presence marks a complete data set.

        Raises: OSError where a file cannot be written.
        """
        write_atomic(folder / REJECTED_NAME, encode_ledger(rejected))
        document = {"version": VERSION, "hash": self.hash, **self._document()}
        filters = [{**asdict(one), "rule": redact(one.rule)} for one in self.filters]
        # these can repeat options
        document |= {"base": redact(self.base), "licence": redact(self.licence), "filters": filters}
        document["left_out"] = [
            {**asdict(one), "reason": redact(one.reason)} for one in self.left_out
        ]
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        write_atomic(folder / FILE_NAME, text.encode())

    @classmethod
    def load(cls, folder: Path | str, *, option: str, command: str = "") -> "Manifest":
        """Read and check the manifest of a data set.

        folder: path or URL of the data set. option: config path that names the folder, for the
        error. command: command that makes the data set, for the error.
        Raises: ManifestError where the manifest is missing, damaged, or of another version.
        """
        path = join_location(str(folder), FILE_NAME)
        hint = f"; make it with `{command}`" if command else ""
        try:
            document = parse_json(read_bytes(path, limit=MAX_BYTES), limit=MAX_BYTES)
        except FileNotFoundError:
            raise ManifestError(f"{option}: no manifest at {path}{hint}") from None
        except ValueError as error:
            raise ManifestError(f"{option}: {path} is not JSON ({error}){hint}") from error
        try:
            if not is_json_object(document):
                raise ValueError("not a JSON object")
            version, stated = document.pop("version"), document.pop("hash")
            if version != VERSION:
                raise ValueError(f"version {version}, but this program reads {VERSION}")
            manifest = _parse(document)
            if manifest.hash != stated:
                raise ValueError("its hash is not the one it states: it was edited or damaged")
            base = restore(manifest.base)
            if "${oc.env:" in base:
                raise ValueError(f"its shards are at {base}: set data.source.path as it was packed")
        except KeyError as error:
            raise ManifestError(f"{option}: {path} is damaged: no entry {error}{hint}") from error
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise ManifestError(f"{option}: {path} is damaged: {error}{hint}") from error
        return replace(manifest, base=base)


def data_sets(folders: Mapping[str, str]) -> dict[str, str]:
    """Select the folders that hold a manifest: {option that names it: folder}.

    Raises: ValueError where no folder holds one.
    """
    found: dict[str, str] = {}
    for option, folder in folders.items():
        try:
            size_bytes(join_location(folder, FILE_NAME))
        except FileNotFoundError:
            continue
        found[option] = folder
    if not found:
        raise ValueError(f"no data set at {', '.join(folders.values())}: run trainer.pack first")
    return found


def _parse(document: dict[str, Any]) -> Manifest:
    """Build a manifest from JSON, and check every entry against the type of its field."""
    latents = document["latents"]
    if "left_out" not in document:
        document["left_out"] = _account_of_0_1_0(document)
    entries = {
        "kind": Kind(document["kind"]),
        "shards": [_build(Shard, shard) for shard in document["shards"]],
        "filters": [_build(FilterCount, count) for count in document["filters"]],
        "left_out": [_build(LeftOut, entry) for entry in document["left_out"]],
        "latents": None if latents is None else _build(LatentInfo, {**LATER, **latents}),
    }
    manifest = _build(Manifest, LATER_ENTRIES | document | entries)
    if manifest.latents is not None:
        _check_latents(manifest.latents)
    return manifest


def _account_of_0_1_0(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entry `left_out` of a manifest without one, from its counts."""
    counts = [(Fate.rejected, *item) for item in document["rejected"].items()]
    counts += [(Fate.filtered, one["rule"], one["dropped"]) for one in document["filters"]]
    return [
        {"fate": fate.value, "reason": reason, "count": count, "examples": []}
        for fate, reason, count in counts
        if count
    ]


def _check_latents(info: LatentInfo) -> None:
    """Raise ValueError where shape or statistics cannot be those of latents."""
    if len(info.shape) != 3 or min(info.shape) < 1 or math.prod(info.shape) > MAX_LATENT_VALUES:
        raise ValueError(f"latents of shape {info.shape}")
    if not len(info.mean) == len(info.std) == info.shape[0]:
        raise ValueError(f"mean and std of {len(info.mean)} and {len(info.std)} channels")
    if not all(abs(mean) <= MAX_STATISTIC for mean in info.mean):
        raise ValueError("a mean that latents cannot have")
    if not all(1 / MAX_STATISTIC <= std <= MAX_STATISTIC for std in info.std):
        raise ValueError("a standard deviation that latents cannot have")


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
    if is_json_array(value) and get_origin(hint) is list:
        return all(_conforms(item, arguments[0]) for item in value)
    if is_json_object(value) and get_origin(hint) is dict:
        return all(_conforms(item, arguments[1]) for item in value.values())
    return type(value) is hint or (hint is float and type(value) is int)
