import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from trainer.metrics.feature_set import FeatureSet
from trainer.metrics.moments import GaussianMoments
from trainer.metrics.reference import (
    ReferenceMismatchError,
    ReferenceSource,
    load_reference,
    save_reference,
)

SOURCE = ReferenceSource(
    features="inception",
    fingerprint="f" * 64,
    resize="bilinear",
    dataset="d" * 64,
    image_size=64,
    num_samples=20,
    seed=0,
    choice="philox, sorted",
)


@pytest.fixture
def found() -> FeatureSet:
    rows = torch.randn(20, 6)
    moments = GaussianMoments(6)
    moments.update(rows)
    return FeatureSet(moments, rows[:5])


def test_a_reference_comes_back_bit_for_bit_and_says_what_it_is(
    tmp_path: Path, found: FeatureSet
) -> None:
    path = save_reference(tmp_path / "references", SOURCE, found)
    loaded = load_reference(tmp_path / "references", SOURCE)
    assert torch.equal(loaded.rows, found.rows)
    for name, total in found.moments.state().items():
        assert torch.equal(total, loaded.moments.state()[name])
    manifest = json.loads(path.read_text())
    assert manifest.items() >= {**asdict(SOURCE), "images": 20, "rows": 5}.items()
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".json", ".safetensors"]


def test_a_reference_of_all_images_has_the_name_and_manifest_of_version_0_1(
    tmp_path: Path, found: FeatureSet
) -> None:
    whole = replace(SOURCE, choice="")
    fields = {name: value for name, value in asdict(SOURCE).items() if name != "choice"}
    text = json.dumps(fields, sort_keys=True)
    assert whole.hash == hashlib.sha256(text.encode()).hexdigest()
    assert "choice" not in json.loads(save_reference(tmp_path, whole, found).read_text())
    assert torch.equal(load_reference(tmp_path, whole).rows, found.rows)


@pytest.mark.parametrize("name", asdict(SOURCE))
def test_a_reference_of_something_else_is_another_file_and_refused(
    tmp_path: Path, name: str, found: FeatureSet
) -> None:
    path = save_reference(tmp_path, SOURCE, found)
    other = replace(SOURCE, **{name: 7 if isinstance(asdict(SOURCE)[name], int) else "other"})
    with pytest.raises(FileNotFoundError):
        load_reference(tmp_path, other)
    for file in list(path.parent.iterdir()):
        file.rename(other.path(tmp_path).with_suffix(file.suffix))
    with pytest.raises(ReferenceMismatchError, match=f"is of {name} .*delete it"):
        load_reference(tmp_path, other)


def test_damaged_references_are_refused(tmp_path: Path, found: FeatureSet) -> None:
    path = save_reference(tmp_path, SOURCE, found)
    file, manifest = path.with_suffix(".safetensors"), path.read_text()
    whole = file.read_bytes()
    tensors = load(whole)
    for broken in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(broken)
        with pytest.raises(ReferenceMismatchError, match=r"not what .* describes.*delete it"):
            load_reference(tmp_path, SOURCE)
    for state, message in (
        ({"sum": tensors["sum"]}, "holds no reference"),
        ({**tensors, "sum": tensors["sum"][:5]}, "holds no reference"),
        ({**tensors, "outer": tensors["outer"] * torch.nan}, "NaN"),
    ):
        replace_file(path, save(state))
        with pytest.raises(ReferenceMismatchError, match=message):
            load_reference(tmp_path, SOURCE)
    for text in ("{", "[]", manifest.replace('"version": 1', '"version": 0')):
        path.write_text(text)
        with pytest.raises(ReferenceMismatchError, match="delete it"):
            load_reference(tmp_path, SOURCE)


def replace_file(path: Path, content: bytes) -> None:
    """Put another file under a manifest, with its hash."""
    path.with_suffix(".safetensors").write_bytes(content)
    manifest = json.loads(path.read_text())
    manifest["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest))
