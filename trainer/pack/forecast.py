"""`python -m trainer.pack … pack.dry_run=true`: samples, shards, bytes and time, from a sample."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.config import DataConfig, SourceKind
from data.shards.captions import CaptionRule, choose_caption
from data.shards.codecs import (
    ANNOTATION_EXTENSIONS,
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    BadSampleError,
    Buffer,
    decode_image,
    encode_png,
    image_size,
)
from data.shards.index import MEMBER_DTYPE
from data.shards.manifest import Kind, Manifest, Shard
from data.shards.reader import ShardReader
from data.shards.register import Part, Selection, register_parts
from data.shards.transforms import square
from data.sources.samples import RawSample
from data.sources.sources import open_source
from data.sources.tars import list_tars_of
from data.storage.files import join_location, size_bytes
from models.config.conditioning import CONDITIONERS
from trainer.config import Config
from trainer.pack.samples import first_to_drop, members_of
from trainer.pack.sizes import Side, size_lines

SAMPLED = 512
"""Raw samples that are read."""
SAMPLED_TARS = 4
BLOCK = 512
"""Bytes of a header of a tar; contents are padded to it, too."""
NPY_HEADER_BYTES = 128
COPIED = (*CAPTION_EXTENSIONS, *ANNOTATION_EXTENSIONS, "json")


@dataclass(slots=True)
class Forecast:
    """What packing and precomputing will make."""

    samples: float
    """Samples of both splits that will be kept."""
    shards: float
    shard_bytes: float
    """Bytes of tars that will be written; 0 where existing ones stay."""
    index_bytes: float
    latent_bytes: float
    text_bytes: float
    """Of them the output of the text encoder."""
    pack_s: float
    sides: Sequence[Side]
    """Of the pictures that were read."""


def print_forecast(config: Config) -> None:
    """Print what packing and precomputing would make, and write nothing.

    Raises: FileNotFoundError or ValueError that names the option of a source that cannot be read.
    """
    of_tars = config.data.source.kind is SourceKind.webdataset
    found = forecast_tars(config) if of_tars else forecast_shards(config)
    gib = 2**30
    print(f"samples:  {found.samples:,.0f} in {found.shards:,.0f} shards")
    place = "the tars stay where they are" if of_tars else f"{found.shard_bytes / gib:.3f} GiB"
    indexes = f"{found.index_bytes / gib:.3f} GiB of indexes"
    print(f"shards:   {place}, and {indexes}, in {config.data.dir}")
    text = f", {found.text_bytes / gib:.3f} of them text" if config.data.store_text else ""
    print(f"latents:  {found.latent_bytes / gib:.3f} GiB{text}, in {config.data.latents}")
    print(f"time:     {duration(found.pack_s)} to pack on this machine")
    print("\n".join(size_lines(found.sides, config.data.image_size)))


def duration(seconds: float) -> str:
    """Return a duration in words, such as `2 h 5 min`."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 60 else f"{minutes // 60:.0f} h {minutes % 60:.0f} min"


def forecast_shards(config: Config) -> Forecast:
    """Forecast from a source whose images are written to shards."""
    data, source = config.data, open_source(config.data)
    begin = time.perf_counter()
    kept: list[tuple[RawSample, dict[str, bytes]]] = []
    read = 0
    for item in source.sample(SAMPLED):
        read += 1
        try:
            if isinstance(item, RawSample) and first_to_drop(data, item) is None:
                kept.append((item, members_of(item)))
        except BadSampleError:
            continue
    elapsed_s = time.perf_counter() - begin
    samples = source.images * len(kept) / max(read, 1)
    each = [_tar_bytes(members) for _, members in kept]
    extensions = {name for _, members in kept for name in members}
    copied = [_copied_bytes(members, data) for _, members in kept]
    shard_bytes = samples * _mean(each)
    latents, text = _latent_bytes(config)
    return Forecast(
        samples=samples,
        shards=np.ceil(samples / data.source.shard_samples),
        shard_bytes=shard_bytes,
        index_bytes=samples * _index_bytes(len(extensions)),
        latent_bytes=_in_train(data, samples) * (latents + text + _mean(copied)),
        text_bytes=_in_train(data, samples) * text,
        pack_s=elapsed_s / max(read, 1) * source.images,
        sides=[(item.width, item.height) for item, _ in kept],
    )


def forecast_tars(config: Config) -> Forecast:
    """Forecast from a few of the tars of a webdataset."""
    data, found = config.data, _look(config.data)
    latents, text = _latent_bytes(config)
    return Forecast(
        samples=found.samples,
        shards=found.tars,
        shard_bytes=0,
        index_bytes=found.samples * _index_bytes(4),
        latent_bytes=_in_train(data, found.samples) * (latents + text + found.copied_bytes),
        text_bytes=_in_train(data, found.samples) * text,
        pack_s=found.read_s / max(data.source.workers, 1),
        sides=found.sides,
    )


def look_at_tars(data: DataConfig) -> tuple[int, Sequence[Side], float]:
    """Look at a few tars: (samples of all, sides of some pictures, part with a caption)."""
    found = _look(data)
    return round(found.samples), found.sides, found.captioned


@dataclass(frozen=True, slots=True)
class _Look:
    """What a few tars tell of all."""

    tars: int
    samples: float
    read_s: float
    """Time to register all tars in one process."""
    copied_bytes: float
    """Mean bytes of a sample that a latent shard copies."""
    sides: Sequence[Side]
    captioned: float


def _look(data: DataConfig) -> _Look:
    base, names = list_tars_of(data.source.path)
    sizes = {name: size_bytes(join_location(base, name)) for name in names}
    order = sorted(names, key=sizes.__getitem__)
    count = min(SAMPLED_TARS, len(order))
    chosen = [order[(2 * place + 1) * len(order) // (2 * count)] for place in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        rule = CaptionRule.of(data)
        part = Part(Path(folder))
        selection = Selection([part], data.filters, rule, empty_captions=not rule.required)
        begin = time.perf_counter()
        made = [register_parts(name, Kind.images, base, selection)[0] for name in chosen]
        elapsed_s = time.perf_counter() - begin
        shards = [one.shard for one in made]
        times = sum(sizes.values()) / max(sum(shard.size_bytes for shard in shards), 1)
        sides, copied, captioned = _members(folder, base, shards, data)
    samples = times * sum(shard.samples for shard in shards)
    return _Look(len(names), samples, elapsed_s * times, _mean(copied), sides, _mean(captioned))


def _members(
    folder: str, base: str, shards: list[Shard], data: DataConfig
) -> tuple[list[Side], list[int], list[bool]]:
    """Return, for some samples, sides, bytes that a latent shard copies, and whether captioned."""
    manifest = Manifest(kind=Kind.images, shards=shards, base=base)
    reader, rule = ShardReader(folder, manifest, data.cache, source=base), CaptionRule.of(data)
    sides: list[Side] = []
    copied: list[int] = []
    captioned: list[bool] = []
    numbers = np.linspace(0, manifest.samples - 1, min(manifest.samples, SAMPLED))
    for stored in reader.find(np.unique(numbers.astype(np.int64))):
        _, *names = stored.shard.index.dtype.names or ("key",)
        members = {name: stored.payload(name) for name in names if stored.has(name)}
        copied.append(_copied_bytes(members, data))
        with suppress(BadSampleError):
            sides.append(image_size(next(members[n] for n in IMAGE_EXTENSIONS if n in members)))
            captioned.append(bool(choose_caption(members.get, rule)))
    return sides, copied, captioned


def _in_train(data: DataConfig, samples: float) -> float:
    return samples * (1 - data.source.val_share)


def _latent_bytes(config: Config) -> tuple[float, float]:
    """Return the bytes of a sample's latents, and of its text, in a tar."""
    stage, data = config.autoencoder, config.data
    side = data.image_size // stage.downsample_factor
    moments = _member_bytes(NPY_HEADER_BYTES + 2 * stage.latent_channels * side**2 * 2)
    text = 0
    if data.store_text and CONDITIONERS[config.conditioner.kind].stores_text:
        tokens = config.conditioner.context_length * config.conditioner.width
        text = _member_bytes(NPY_HEADER_BYTES + tokens * 2)
    return moments * (2 if data.flip else 1) + _index_bytes(3), text


def _copied_bytes(members: Mapping[str, Buffer], data: DataConfig) -> int:
    """Return the bytes of the captions, metadata and annotations that a latent shard copies.

    With data.store_images, also those of the image, cropped and resized.
    """
    copied = sum(_member_bytes(len(members[n])) for n in COPIED if n in members)
    if data.store_images:
        with suppress(BadSampleError):
            payload = next(members[n] for n in IMAGE_EXTENSIONS if n in members)
            pixels = square(decode_image(payload, data.pixels), data.image_size)
            copied += _member_bytes(len(encode_png(Image.fromarray(pixels))))
            copied += MEMBER_DTYPE.itemsize  # in the index
    return copied


def _tar_bytes(members: Mapping[str, bytes]) -> int:
    return sum(_member_bytes(len(payload)) for payload in members.values())


def _member_bytes(size: int) -> int:
    return BLOCK + -(-size // BLOCK) * BLOCK


def _index_bytes(members: int) -> int:
    return 9 + members * MEMBER_DTYPE.itemsize


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
