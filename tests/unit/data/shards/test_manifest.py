"""The manifest: what is saved is what is loaded, and its hash is the data set's identity."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards.manifest import (
    FilterCount,
    Kind,
    LatentInfo,
    Manifest,
    ManifestError,
    Rejected,
    Shard,
)

sizes = st.integers(0, 2**60)
shards = st.builds(
    Shard,
    name=st.from_regex(r"[a-z0-9]{1,8}(/[a-z0-9]{1,8})?\.tar", fullmatch=True),
    samples=st.integers(0, 2**40),
    size_bytes=sizes,
    sha256=st.text(max_size=5),
    index_sha256=st.text(max_size=5),
)
latents = st.builds(
    LatentInfo,
    source_hash=st.text(max_size=5),
    encoder=st.text(max_size=5),
    transform=st.text(max_size=5),
    shape=st.tuples(st.just(2), st.integers(1, 64), st.integers(1, 64)).map(list),
    mean=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2),
    std=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=2),
    flip=st.booleans(),
    text_encoder=st.text(max_size=5),
)
manifests = st.builds(
    Manifest,
    kind=st.sampled_from(Kind),
    shards=st.lists(shards, max_size=4),
    image_size=st.integers(0, 512),
    licence=st.text(max_size=20),
    rejected=st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
    filters=st.lists(
        st.builds(FilterCount, rule=st.text(max_size=5), kept=sizes, dropped=sizes), max_size=2
    ),
    map_classes=st.lists(st.text(max_size=5), max_size=2),
    box_classes=st.lists(st.text(max_size=5), max_size=2),
    downloads=st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
    source=st.text(max_size=5),
    base=st.text(max_size=5),
    latents=st.none() | latents,
)


@settings(deadline=None, max_examples=200)
@given(manifests)
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, manifest: Manifest
) -> None:
    folder = tmp_path_factory.mktemp("set")
    manifest.save(folder)
    loaded = Manifest.load(folder, option="data.train")
    assert loaded == manifest
    assert loaded.hash == manifest.hash


def manifest() -> Manifest:
    shard = Shard(name="0.tar", samples=3, size_bytes=10240, sha256="a", index_sha256="b")
    info = LatentInfo(
        source_hash="s", encoder="e", transform="t", shape=[1, 8, 8], mean=[0.0], std=[1.0]
    )
    return Manifest(kind=Kind.latents, shards=[shard], latents=info)


def test_the_hash_is_that_of_the_content_and_not_of_the_place() -> None:
    original = manifest()
    moved = dataclasses.replace(original, base="s3://elsewhere", licence="CC0", source="x")
    assert moved.hash == original.hash
    counts = [FilterCount(rule="x >= 1", kept=3, dropped=0)]
    retold = dataclasses.replace(moved, filters=counts, downloads={"count": 3}, rejected={"a": 1})
    assert retold.hash == original.hash
    (shard,) = original.shards
    assert original.latents is not None
    others = [
        dataclasses.replace(original, kind=Kind.images),
        dataclasses.replace(original, shards=[shard, shard]),
        dataclasses.replace(original, latents=None),
        dataclasses.replace(original, latents=dataclasses.replace(original.latents, encoder="f")),
        *(
            dataclasses.replace(original, shards=[dataclasses.replace(shard, **{name: value})])
            for name, value in [("name", "1.tar"), ("samples", 4), ("sha256", "c")]
        ),
    ]
    assert len({original.hash, *(other.hash for other in others)}) == 1 + len(others)


def test_rejected_samples_are_listed(tmp_path: Path) -> None:
    rejected = [
        Rejected(key="ü.png", reason="no caption"),
        Rejected(key="", reason="cut off", shard="0.tar"),
    ]
    manifest().save(tmp_path, rejected)
    lines = (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines()
    assert [Rejected(**json.loads(line)) for line in lines] == rejected


def test_a_missing_manifest_names_the_option_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.load(tmp_path, option="data.val", command="python -m trainer.pack")
    assert str(caught.value) == (
        f"data.val: no manifest at {tmp_path}/manifest.json; make it with `python -m trainer.pack`"
    )


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    "entries",
    [
        {"shape": [1, 3_000_000, 3_000_000]},
        {"shape": [1, 8, 10**30]},
        {"shape": [1, -8, -8]},
        {"shape": [0, 8, 8], "mean": [], "std": []},
        {"shape": [1, 8]},
        {"shape": []},
        {"mean": [NAN]},
        {"mean": [INFINITE]},
        {"mean": [10**400]},
        {"mean": [0.0, 0.0]},
        {"std": [0.0]},
        {"std": [-1.0]},
        {"std": [1e-300]},
        {"std": [NAN]},
        {"std": []},
    ],
    ids=str,
)
def test_latents_that_cannot_be_are_refused(tmp_path: Path, entries: dict[str, Any]) -> None:
    """The hash fits: a stranger can compute it, too."""
    sound = manifest()
    assert sound.latents is not None
    forged = dataclasses.replace(sound, latents=dataclasses.replace(sound.latents, **entries))
    forged.save(tmp_path)
    with pytest.raises(ManifestError, match=r"^data\.latents: .*manifest\.json is damaged: "):
        Manifest.load(tmp_path, option="data.latents")


@pytest.mark.parametrize(
    "entries", [{"samples": 10**30}, {"size_bytes": 2**63}, {"samples": -1}], ids=str
)
def test_sizes_that_cannot_be_are_refused(entries: dict[str, int]) -> None:
    (shard,) = manifest().shards
    with pytest.raises(ValueError, match=r"0\.tar has"):
        dataclasses.replace(shard, **entries)


@pytest.mark.parametrize(
    ("base", "source", "is_allowed"),
    [
        ("", "", True),
        ("/sets/own", "", True),
        ("/sets/own/tars", "", True),
        ("/sets/other", "", False),
        ("/sets/own/../other", "", False),
        ("http://127.0.0.1/internal", "", False),
        ("s3://bucket/a", "s3://bucket/b", False),
        ("s3://bucket/a", "s3://bucket/a", True),
        ("s3://bucket/a", "/data::s3://bucket/a", True),
        ("s3://bucket/a", "s3://bucket/a/{0..3}.tar", True),
        ("s3://bucket/a", "s3://bucket/a/{1..3}.tar", False),
        ("s3://bucket", "s3://bucket/a", False),
    ],
)
def test_a_manifest_leads_only_where_an_option_leads(
    base: str, source: str, is_allowed: bool
) -> None:
    led = dataclasses.replace(manifest(), base=base)
    if is_allowed:
        assert led.shards_at("/sets/own", source) == (base or "/sets/own")
    else:
        with pytest.raises(ManifestError, match=r"^data\.source\.path: .* leads to 0\.tar in"):
            led.shards_at("/sets/own", source)


Edit = Callable[[dict[str, Any]], object]


def change(**entries: Any) -> Edit:
    return lambda document: document | entries


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (change(version=2), "version 2, but this program reads 1"),
        (change(kind="pickles"), "'pickles' is not a valid Kind"),
        (change(image_size="64"), "image_size is of the wrong type"),
        (change(rejected={"a": "b"}), "rejected is of the wrong type"),
        (change(filters=[{"rule": "x", "kept": "3", "dropped": 0}]), "kept is of the wrong type"),
        (change(downloads={"count": 1.5}), "downloads is of the wrong type"),
        (change(extra=1), "missing or unknown: ['extra']"),
        (change(shards=[{"name": "0.tar"}]), "missing or unknown"),
        (change(licence="other", kind="images"), "its hash is not the one it states"),
        (lambda document: [document], "not a JSON object"),
        (
            lambda document: {name: document[name] for name in ("version", "hash")},
            "no entry 'latents'",
        ),
    ],
)
def test_a_damaged_manifest_is_refused_in_one_line(tmp_path: Path, edit: Edit, reason: str) -> None:
    manifest().save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ManifestError) as caught:
        Manifest.load(tmp_path, option="data.train")
    assert str(caught.value).startswith(f"data.train: {path} is damaged: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_what_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match="is not JSON"):
        Manifest.load(tmp_path, option="data.train")


@pytest.mark.parametrize("name", ["/etc/passwd", "../0.tar", "a/../../0.tar", "", "s3://b/0.tar"])
def test_shards_outside_the_data_set_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="leads out of the data set"):
        Shard(name=name, samples=1, size_bytes=1, sha256="", index_sha256="")
