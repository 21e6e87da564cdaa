"""`python -m trainer.pack … pack.propose=true`: the YAML of an experiment that fits a source."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from data.config import DataConfig, SourceConfig, SourceKind
from data.shards.codecs import IMAGE_EXTENSIONS
from data.sources.caption_tables import TABLES
from data.sources.coco import is_annotation
from data.sources.files import find_pattern, open_zips
from data.sources.folder import SPLITS
from data.sources.image_tables import TABLES as IMAGE_TABLES
from data.sources.image_tables import columns_of
from data.sources.samples import RawSample, Source
from data.sources.sources import open_source
from data.storage.files import local_path
from trainer.config import Config
from trainer.pack.forecast import look_at_tars
from trainer.pack.sizes import Side
from trainer.pack.summary import SHOWN

SAMPLED = 256
MANY = 3000
"""Most files that are looked at to find the kind of a source."""
SIZES = (512, 256, 128, 64, 32)
"""Sizes that the shipped networks were made for, in pixels."""
WHOLE_SHARE = 0.8
"""Part of the pictures that must not be enlarged at the proposed size."""
CAPTION_FIELDS = ("text", "caption", "captions", "prompt", "description", "title", "TEXT")
IMAGE_FIELDS = ("image", "img", "jpg", "png", "picture", "bytes")
LABEL_FIELDS = ("label", "labels", "class", "cls", "category", "fine_label")
SMALL = 64
"""[pixels] Largest size that the shipped first stage was made for."""
FEW, SOME = 2_000, 100_000


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the YAML with its reason."""

    text: str
    reason: str = ""


def print_proposal(config: Config) -> None:
    """Look at data.source.path, and print an experiment for it; write nothing.

    Raises: FileNotFoundError or ValueError where the source cannot be read.
    """
    lines = list(propose(config))
    width = max(len(line.text) for line in lines if line.reason)
    for line in lines:
        print(f"{line.text:<{width}}  # {line.reason}" if line.reason else line.text)


def propose(config: Config) -> Iterator[Line]:
    """Yield the lines of an experiment for data.source.path, after looking at it."""
    kind, why = find_kind(config.data.source.path)
    source = SourceConfig(kind=kind, path=config.data.source.path, val_share=0.02)
    fields: list[Line] = []
    if kind is SourceKind.image_tables:
        source, fields = _with_columns(source)
    facts = _look(replace(config.data, source=replace(source, require_captions=False)))
    size, size_reason = _size(facts.sides)
    yield Line("# @package _global_")
    for entry in facts.left_alone:
        yield Line(f"# {entry}")
    yield Line("defaults:")
    yield from _networks(size, facts)
    yield Line("")
    yield Line("task: diffusion")
    yield Line("run:")
    yield Line("  experiment: own", "the name of this file, conf/experiment/own.yaml")
    yield Line("train:")
    yield from _training(size, facts)
    if facts.captioned <= 0.5 and size <= SMALL:
        yield Line("unet:")
        yield Line("  context_dim: 0", "no tokens without captions")
    yield Line("data:")
    yield Line("  dir: datasets/own", "shards and latents; on a disk that all nodes see")
    yield Line(f"  image_size: {size}", size_reason)
    if facts.several:
        yield Line("  captions: json", f"{facts.several:.0%} of the samples have several captions")
    yield Line("  source:")
    yield Line(f"    kind: {kind}", why)
    yield Line(f"    path: {config.data.source.path}")
    yield from fields
    yield Line("    val_share: 0.02", "kept for evaluation, by a hash of each image")
    if facts.captioned < 1:
        drops = facts.captioned > 0.5
        reason = f"{1 - facts.captioned:.0%} of the pictures have no caption"
        yield Line(f"    require_captions: {str(drops).lower()}", reason)
    yield Line("optim:")
    yield Line("  lr: 1e-4", "the usual rate of AdamW for U-Nets of this kind")


def find_kind(path: str) -> tuple[SourceKind, str]:
    """Return the kind of a source, and what it was told by.

    Raises: FileNotFoundError where there is nothing at the path.
    """
    place = local_path(path)
    if place is None or ".tar" in path:
        return SourceKind.webdataset, "tars, read where they lie"
    names = _names_at(place)
    if not names:
        raise FileNotFoundError(f"data.source.path: nothing at {path!r}")
    suffixes = [PurePosixPath(name).suffix.lower() for name in names]
    pictures = [n for n, s in zip(names, suffixes, strict=True) if s[1:] in IMAGE_EXTENSIONS]
    tars = sum(suffix == ".tar" for suffix in suffixes)
    if tars and not pictures:
        return SourceKind.webdataset, f"{tars} tars, read where they lie"
    if not pictures and any(suffix in IMAGE_TABLES for suffix in suffixes):
        return SourceKind.image_tables, "tables that hold the images"
    described = any(name in TABLES or is_annotation(name) for name in names)
    beside = any(suffix in (".txt", ".json") for suffix in suffixes)
    folders = {name.split("/")[0] for name in pictures if "/" in name}
    if not described and not beside and len(folders) > 1 and not folders <= SPLITS:
        return SourceKind.class_folders, f"{len(folders)} folders of pictures without captions"
    return SourceKind.folder, "pictures with a table or texts beside them" if (
        described or beside
    ) else "pictures"


def _names_at(place: Path) -> list[str]:
    """Return names of files below a folder, or in its zips if it holds no picture; or of a file."""
    named = find_pattern(place) or [place] * place.is_file()
    names = list(_first_files(place)) if place.is_dir() else [one.name for one in named]
    if any(Path(name).suffix.lower()[1:] in IMAGE_EXTENSIONS for name in names):
        return names
    zips = open_zips(str(place))
    if zips is None:
        return names
    return [zips.inner(name) for name in (*zips.listing.images, *zips.listing.inputs)]


def _first_files(folder: Path) -> Iterator[str]:
    count = 0
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            yield (Path(place) / name).relative_to(folder).as_posix()
            count += 1
            if count == MANY:
                return


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a look at some samples tells."""

    images: int
    sides: Sequence[Side]
    captioned: float
    """Part of the samples with a caption."""
    several: float
    """Part of the samples with several captions."""
    classes: int
    left_alone: list[str] = field(default_factory=list[str])
    """Files that are no samples, by reason."""


def _look(data: DataConfig) -> _Facts:
    if data.source.kind is SourceKind.webdataset:
        images, sides, captioned = look_at_tars(data)
        return _Facts(images, sides, captioned, 0, 0)
    source: Source = open_source(data)
    samples = [item for item in source.sample(SAMPLED) if isinstance(item, RawSample)]
    if not samples:
        raise ValueError(
            f"data.source.path: none of the pictures at {data.source.path} can be read"
        )
    count = len(samples)
    return _Facts(
        images=source.images,
        sides=[(item.width, item.height) for item in samples],
        captioned=sum(bool(item.caption) for item in samples) / count,
        several=sum("captions" in item.metadata for item in samples) / count,
        classes=len(source.classes),
        left_alone=[str(entry) for entry in source.left_alone.entries()[:SHOWN]],
    )


def _with_columns(source: SourceConfig) -> tuple[SourceConfig, list[Line]]:
    """Find the columns of images, captions and classes by their usual names."""
    columns = columns_of(Path(source.path))
    lines: list[Line] = []
    for option, names in (
        ("image_field", IMAGE_FIELDS),
        ("caption_field", CAPTION_FIELDS),
        ("label_field", LABEL_FIELDS),
    ):
        found = next((name for name in names if name in columns), None)
        if found is not None and found != getattr(source, option):
            source = replace(source, **{option: found})
            lines.append(Line(f"    {option}: {found}", f"of the columns {', '.join(columns)}"))
    return source, lines


def _size(sides: Sequence[Side]) -> tuple[int, str]:
    short = np.array(sides).reshape(-1, 2).min(1)
    for size in SIZES:
        share = float((short >= size).mean())
        if share >= WHOLE_SHARE:
            return size, f"{share:.0%} of the pictures are at least as large"
    return SIZES[-1], "the pictures are smaller than that"


def _networks(size: int, facts: _Facts) -> Iterator[Line]:
    small = size <= SMALL
    if small:
        yield Line("  - /autoencoder: emoji_f4", "ships with its weights, for pictures up to 64 px")
    else:
        yield Line("  - /autoencoder: kl_f8", "set autoencoder.weights to a trained first stage")
    if facts.classes and facts.captioned == 1 and not small:
        yield Line("  - /conditioner: none", f"or class_label: {facts.classes} classes")
    elif facts.captioned > 0.5:
        encoder = "emoji_clip" if small else "openclip_vit_h14"
        yield Line(f"  - /conditioner: {encoder}", f"{facts.captioned:.0%} have captions")
    else:
        yield Line("  - /conditioner: none", "most pictures have no caption")
    unet = "emoji" if small else "sd2" if facts.captioned > 0.5 else "ldm8_churches"
    yield Line(f"  - /unet: {unet}", f"of a size for {facts.images:,} pictures of {size} px")
    yield Line("  - /diffusion: stable_diffusion")
    yield Line("  - /sampler: dpmpp_2m")
    yield Line("  - /deepspeed: zero1")


def _training(size: int, facts: _Facts) -> Iterator[Line]:
    batch = 32 if facts.images < FEW or size <= 64 else 256 if facts.images < SOME else 1024
    steps = max(2_000, min(500_000, 200 * facts.images // batch))
    yield Line(f"  max_steps: {steps}", f"{steps * batch / facts.images:.0f} visits to each")
    yield Line(f"  global_batch_size: {batch}", "of all GPUs together")
    yield Line(f"  micro_batch_size: {min(batch, 32)}", "of one GPU at once, see `trainer.plan`")
