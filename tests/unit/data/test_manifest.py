"""The manifest: what is saved is what is loaded, and its hash is the data set's identity."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.manifest import FilterCount, Kind, LatentInfo, Manifest, ManifestError, Rejected, Shard

finite = st.floats(allow_nan=False, allow_infinity=False)
sizes = st.integers(0, 2**60)
shards = st.builds(
    Shard,
    name=st.from_regex(r"[a-z0-9]{1,8}(/[a-z0-9]{1,8})?\.tar", fullmatch=True),
    samples=sizes,
    size_bytes=sizes,
    sha256=st.text(max_size=5),
    index_sha256=st.text(max_size=5),
)
latents = st.builds(
    LatentInfo,
    source_hash=st.text(max_size=5),
    encoder=st.text(max_size=5),
    transform=st.text(max_size=5),
    shape=st.lists(st.integers(1, 64), min_size=3, max_size=3),
    mean=st.lists(finite, max_size=4),
    std=st.lists(finite, max_size=4),
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
    downloads=st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
    source=st.text(max_size=5),
    base=st.text(max_size=5),
    latents=st.none() | latents,
)


@settings(deadline=None, max_examples=50)
@given(manifests)
def test_what_is_saved_is_loaded(tmp_path_factory, manifest):
    folder = tmp_path_factory.mktemp("set")
    manifest.save(folder)
    loaded = Manifest.load(folder, option="data.train")
    assert loaded == manifest
    assert loaded.hash == manifest.hash


def manifest() -> Manifest:
    shard = Shard(name="0.tar", samples=3, size_bytes=10240, sha256="a", index_sha256="b")
    info = LatentInfo(
        source_hash="s", encoder="e", transform="t", shape=[4, 8, 8], mean=[0.0], std=[1.0]
    )
    return Manifest(kind=Kind.latents, shards=[shard], latents=info)


def test_the_hash_is_that_of_the_content_and_not_of_the_place():
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


def test_rejected_samples_are_listed(tmp_path):
    rejected = [
        Rejected(key="ü.png", reason="no caption"),
        Rejected(key="", reason="cut off", shard="0.tar"),
    ]
    manifest().save(tmp_path, rejected)
    lines = (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines()
    assert [Rejected(**json.loads(line)) for line in lines] == rejected


def test_a_missing_manifest_names_the_option_and_the_command(tmp_path):
    with pytest.raises(ManifestError) as caught:
        Manifest.load(tmp_path, option="data.val", command="python -m trainer.pack")
    assert str(caught.value) == (
        f"data.val: no manifest at {tmp_path}/manifest.json; make it with `python -m trainer.pack`"
    )


def change(**entries):
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
def test_a_damaged_manifest_is_refused_in_one_line(tmp_path, edit, reason):
    manifest().save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ManifestError) as caught:
        Manifest.load(tmp_path, option="data.train")
    assert str(caught.value).startswith(f"data.train: {path} is damaged: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_what_is_not_json_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match="is not JSON"):
        Manifest.load(tmp_path, option="data.train")


@pytest.mark.parametrize("name", ["/etc/passwd", "../0.tar", "a/../../0.tar", "", "s3://b/0.tar"])
def test_shards_outside_the_data_set_are_refused(name):
    with pytest.raises(ValueError, match="leads out of the data set"):
        Shard(name=name, samples=1, size_bytes=1, sha256="", index_sha256="")
