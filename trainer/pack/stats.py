"""`python -m trainer.pack … stats=true`: sizes, captions and contact sheets of the data sets."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from data.config import DataConfig
from data.shards.account import Fate
from data.shards.codecs import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    BadSampleError,
    decode_image,
    decode_text,
    encode_png,
    image_size,
)
from data.shards.manifest import LatentInfo, Manifest, data_sets
from data.shards.metadata import aspect
from data.shards.reader import ShardReader
from data.shards.stored import StoredSample
from data.sources.listing import CONTACT_SHEET_NAME
from data.storage.atomic import write_atomic
from data.storage.files import local_path
from data.text import printable
from trainer.pack.sizes import size_lines
from trainer.pictures.sheets import contact_sheet

PICTURES = 64
MAX_MEASURED = 10_000
MAX_SHARDS = 32
"""Most shards opened if only MAX_MEASURED samples are measured: each remote one is downloaded."""
LABEL_WIDTH, COLUMN_WIDTH = 22, 10


def print_statistics(data: DataConfig) -> None:
    """Print statistics of data.train, data.val and data.latents; write contact sheets of images.

    Raises: ValueError if there is no data set, or if one is damaged.
    """
    sets = data_sets({"data.train": data.train, "data.val": data.val, "data.latents": data.latents})
    for option, folder in sets.items():
        manifest = Manifest.load(folder, option=option)
        print("\n".join([f"{option}: {folder}", *_counts(manifest)]))
        if manifest.latents is None:
            reader, samples = (
                ShardReader(folder, manifest, data.cache, source=data.source.path),
                even_sample(manifest),
            )
            if len(samples) < manifest.samples:
                print(f"  measured on {len(samples):,} samples, spread evenly over the set:")
            print("\n".join(_measurements(reader, samples, data.image_size)))
            print(_note("contact sheet", _draw(folder, reader, samples)))
        else:
            print("\n".join(_latents(manifest.latents)))


def measured_sides(data: DataConfig, manifest: Manifest) -> list[tuple[int, int]]:
    """Return (width, height) in pixels of a sample of the pictures in data.train."""
    reader = ShardReader(data.train, manifest, data.cache, source=data.source.path)
    sides: list[tuple[int, int]] = []
    for stored in reader.find(even_sample(manifest)):
        with suppress(BadSampleError):
            sides.append(image_size(_member(stored, IMAGE_EXTENSIONS)))
    return sides


def even_sample(manifest: Manifest) -> NDArray[np.int64]:
    """Choose up to MAX_MEASURED samples, spread evenly over at most MAX_SHARDS shards.

    Returns their numbers in the order of the manifest: [N] int64.
    """
    if manifest.samples <= MAX_MEASURED:
        return np.arange(manifest.samples)
    sizes = manifest.shard_sizes
    starts = np.cumsum(sizes) - sizes
    filled = np.flatnonzero(sizes)
    chosen = filled[_even(len(filled), MAX_SHARDS)]
    share = MAX_MEASURED // len(chosen)
    return np.concatenate([starts[shard] + _even(int(sizes[shard]), share) for shard in chosen])


def _even(total: int, count: int) -> NDArray[np.int64]:
    """Spread at most `count` integers evenly over [0, total): [N] int64."""
    count = min(total, count)
    return (np.arange(count) * 2 + 1) * total // (2 * max(count, 1))


def _row(label: str, *values: str) -> str:
    return f"  {label:<{LABEL_WIDTH}}" + "".join(f"{value:>{COLUMN_WIDTH}}" for value in values)


def _note(label: str, text: str) -> str:
    return f"  {label:<{LABEL_WIDTH}}  {text}"


def _spread(label: str, values: Sequence[float], decimals: int = 0) -> str:
    points: list[float] = []
    if values:
        points = np.percentile(values, [0, 50, 100], method="lower").tolist()
    return _row(label, *(f"{point:,.{decimals}f}" for point in points))


def _counts(manifest: Manifest) -> Iterator[str]:
    """Yield the numbers of samples, shards, bytes, and of samples that were left out."""
    yield _row("samples", f"{manifest.samples:,}")
    yield _row("shards", f"{len(manifest.shards):,}")
    yield _row("MiB", f"{manifest.size_bytes / 2**20:,.1f}")
    yield _row("KiB a sample", f"{manifest.size_bytes / 2**10 / max(1, manifest.samples):,.1f}")
    for name, count in manifest.downloads.items():
        yield _row("img2dataset", f"{count:,}") + f"  {name}"
    yield _row("found", f"{manifest.found:,}")
    for entry in manifest.left_out:
        if entry.fate != Fate.filtered:
            names = f"  {', '.join(entry.examples)}" if any(entry.examples) else ""
            yield _row(entry.fate, f"{entry.count:,}") + f"  {printable(entry.reason)}{names}"
    for rule in manifest.filters:
        yield (
            _row("dropped by a filter", f"{rule.dropped:,}") + f"  {rule.rule} ({rule.kept:,} kept)"
        )


def _measurements(reader: ShardReader, samples: NDArray[np.int64], size: int) -> Iterator[str]:
    """Measure sides of images, from their headers alone, and lengths of captions."""
    sides: list[tuple[int, int]] = []
    lengths: list[int] = []
    unreadable: Counter[str] = Counter()
    for stored in reader.find(samples):
        try:
            side, length = image_size(_member(stored, IMAGE_EXTENSIONS)), len(_caption(stored))
        except BadSampleError as error:
            unreadable[str(error)] += 1
            continue
        sides.append(side)
        lengths.append(length)
    yield _row("", "min", "median", "max")
    yield _spread("width (px)", [width for width, _ in sides])
    yield _spread("height (px)", [height for _, height in sides])
    yield _spread("aspect", [aspect(*side) for side in sides], 2)
    yield _spread("caption (characters)", lengths)
    for reason, count in unreadable.most_common():
        yield _row("unreadable", f"{count:,}") + f"  {reason}"
    yield from (f"  {line}" for line in size_lines(sides, size))


def _draw(folder: str, reader: ShardReader, samples: NDArray[np.int64]) -> str:
    """Write the contact sheet into the data set's folder; return its path or why there is none."""
    path = local_path(folder)
    if path is None:
        return "none: the data set is not in a local folder"
    pictures: list[tuple[Image, str]] = []
    for stored in reader.find(samples[_even(len(samples), PICTURES)]):
        try:
            image = decode_image(_member(stored, IMAGE_EXTENSIONS))
            pictures.append((image, _caption(stored)))
        except BadSampleError:
            continue  # _measurements counts it, unless only its pixels are damaged
    write_atomic(path / CONTACT_SHEET_NAME, encode_png(contact_sheet(pictures)))
    return str(path / CONTACT_SHEET_NAME)


def _latents(latents: LatentInfo) -> Iterator[str]:
    yield _note("shape", " x ".join(map(str, latents.shape)))
    yield _note("mirrored, too", "yes" if latents.flip else "no")
    yield _row("", "mean", "std")
    for channel, (mean, std) in enumerate(zip(latents.mean, latents.std, strict=True)):
        yield _row(f"channel {channel}", f"{mean:.4f}", f"{std:.4f}")
    yield _note("transform", latents.transform)
    yield _note("encoder", latents.encoder)
    yield _note("text encoder", latents.text_encoder or "none: no text is stored")
    yield _note("made from images", latents.source_hash)


def _member(stored: StoredSample, extensions: Sequence[str]) -> bytes:
    found = next((name for name in extensions if stored.has(name)), extensions[0])
    return stored.payload(found)


def _caption(stored: StoredSample) -> str:
    return decode_text(_member(stored, CAPTION_EXTENSIONS))
