"""References: files of features of real images, with the source of the features.

    references/
        inception-0f1e2d3c4b5a.safetensors   moments of all images, features of up to 50,000
        inception-0f1e2d3c4b5a.json          the manifest, written last

A reference without a manifest is unfinished. Reading a reference cannot execute code.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from data.storage.atomic import write_atomic
from data.storage.documents import is_json_object, read_json
from data.storage.untrusted import read_file
from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.moments import GaussianMoments

FORMAT_VERSION = 1
MAX_ROWS = 50_000
"""Most images whose features are kept: 0.4 GB of Inception's."""
MAX_BYTES = 2**31
"""Largest file of features that is read: 50,000 images, 10,000 features each."""
MOMENTS = ("count", "sum", "outer")


class ReferenceMismatchError(ValueError):
    """A reference is damaged, or has another source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSource:
    """The source of a reference; its hash is part of the name of the file."""

    features: str
    """Name of the extractor."""
    fingerprint: str
    """SHA-256 of its weights."""
    resize: str
    """The resize of the extractor; see `FeatureExtractor`."""
    dataset: str
    """Hash of the data set's manifest."""
    image_size: int
    """Side in pixels of the square images that the extractor gets."""
    num_samples: int
    """Number of images."""
    seed: int
    """Seed of the choice of images."""
    choice: str = ""
    """Name of the draws that chose images (`rng.CHOICE_STREAM`); empty if all images are used."""

    @property
    def hash(self) -> str:
        """SHA-256 of the source, in hex."""
        return hashlib.sha256(json.dumps(self.entries(), sort_keys=True).encode()).hexdigest()

    def entries(self) -> dict[str, str | int]:
        """Return the fields for the manifest; an empty choice is left out, as in version 0.1.0."""
        return {name: value for name, value in asdict(self).items() if name != "choice" or value}

    def path(self, folder: Path) -> Path:
        """Return the path of the manifest."""
        return folder / f"{self.features}-{self.hash[:12]}.json"


def save_reference(folder: Path, source: ReferenceSource, found: FeatureSet) -> Path:
    """Write a reference, then its manifest, each by a rename; return the path of the manifest."""
    path = source.path(folder)
    tensors = {name: total.contiguous() for name, total in found.moments.state().items()}
    content = save({**tensors, "rows": found.rows.contiguous()})
    manifest = {
        "version": FORMAT_VERSION,
        **source.entries(),
        "images": found.moments.count,
        "rows": len(found.rows),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomic(path.with_suffix(".safetensors"), content)
    write_atomic(path, (json.dumps(manifest, indent=1) + "\n").encode())
    return path


def load_reference(folder: Path, source: ReferenceSource) -> FeatureSet:
    """Read the reference of a source.

    Raises: FileNotFoundError; ReferenceMismatchError that names file, difference and fix.
    """
    path = source.path(folder)
    fix = "delete it, and the next evaluation makes it anew"
    manifest = _read_manifest(path, fix)
    for name, value in source.entries().items():
        if manifest.get(name) != value:
            raise ReferenceMismatchError(
                f"{path} is of {name} {manifest.get(name)}, not {value}: {fix}"
            )
    file = path.with_suffix(".safetensors")
    try:
        content = read_file(file, limit=MAX_BYTES, below=folder)
    except FileNotFoundError:
        content = b""
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
        manifest: object = read_json(path, below=path.parent)
    except ValueError as error:
        raise ReferenceMismatchError(f"{path} is not JSON: {fix}") from error
    if not is_json_object(manifest) or manifest.get("version") != FORMAT_VERSION:
        raise ReferenceMismatchError(
            f"{path} is no manifest of format {FORMAT_VERSION} of a reference: {fix}"
        )
    return manifest
