"""References: features of real images, in files that say what they were made from.

    references/
        inception-0f1e2d3c4b5a.safetensors   moments of all images, features of up to 50,000
        inception-0f1e2d3c4b5a.json          the manifest, written last

A reference without a manifest was never finished. Nothing here can execute code.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.frechet import GaussianMoments

FORMAT_VERSION = 1
MAX_ROWS = 50_000
"""Images whose features are kept beside the moments of all: 0.4 GB of Inception's."""
MOMENTS = ("count", "sum", "outer")


class ReferenceMismatchError(ValueError):
    """A reference is damaged, or was made from something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSource:
    """What a reference is made from; its hash is part of the file's name."""

    features: str
    """Name of the extractor."""
    fingerprint: str
    """SHA-256 of its weights."""
    resize: str
    """How it resizes images."""
    dataset: str
    """Hash of the data set's manifest."""
    image_size: int
    """Side, in pixels, of the squares that images are cut to before the extractor sees them."""
    num_samples: int
    """Images asked for."""
    seed: int
    """That chose them."""

    @property
    def hash(self) -> str:
        """SHA-256 of all that, in hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def path(self, folder: Path) -> Path:
        """The manifest's place."""
        return folder / f"{self.features}-{self.hash[:12]}.json"


def save_reference(folder: Path, source: ReferenceSource, found: FeatureSet) -> Path:
    """Write a reference, then its manifest, each by a rename; returns the manifest's path."""
    path = source.path(folder)
    tensors = {name: total.contiguous() for name, total in found.moments.state().items()}
    content = save({**tensors, "rows": found.rows.contiguous()})
    manifest = {
        "version": FORMAT_VERSION,
        **asdict(source),
        "images": found.moments.count,
        "rows": len(found.rows),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(path.with_suffix(".safetensors"), content)
    _write(path, (json.dumps(manifest, indent=1) + "\n").encode())
    return path


def load_reference(folder: Path, source: ReferenceSource) -> FeatureSet:
    """Read a reference that save_reference wrote of the same source.

    Raises FileNotFoundError, or ReferenceMismatchError naming the file, the difference and the fix.
    """
    path = source.path(folder)
    fix = "delete it, and the next evaluation makes it anew"
    manifest = _read_manifest(path, fix)
    for name, value in asdict(source).items():
        if manifest.get(name) != value:
            raise ReferenceMismatchError(
                f"{path} is of {name} {manifest.get(name)}, not {value}: {fix}"
            )
    file = path.with_suffix(".safetensors")
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != manifest.get("sha256"):
        raise ReferenceMismatchError(f"{file} is not what {path} describes: {fix}")
    try:
        tensors = load(content)
        moments = GaussianMoments.from_state({name: tensors[name] for name in MOMENTS})
        found = FeatureSet(moments, tensors["rows"])
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ReferenceMismatchError(f"{file} holds no reference: {fix}") from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ReferenceMismatchError(f"{file} holds NaN or infinity: {fix}")
    return found


def _read_manifest(path: Path, fix: str) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ReferenceMismatchError(f"{path} is not JSON: {fix}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != FORMAT_VERSION:
        raise ReferenceMismatchError(
            f"{path} is no manifest of format {FORMAT_VERSION} of a reference: {fix}"
        )
    return manifest


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)
