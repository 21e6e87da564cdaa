"""Batches gathered from shards, against tarfile and numpy.load reading one by one."""

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Never

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.order.batches import Share
from data.shards.codecs import BadSampleError, decode_npy, encode_npy
from data.shards.manifest import Kind, LatentInfo, Manifest
from data.shards.reader import ShardReader
from data.shards.register import register_shard
from data.shards.stored import ArrayLayout
from data.shards.writer import ShardWriter
from data.streams.latents import LatentStream
from data.streams.stream import Batch, Randomness
from tests.support.data_sets import DataSet, data_config

SHAPE = (2, 4, 2, 3)
TEXT_SHAPE = (3, 5)
CANARY = Path(tempfile.gettempdir()) / "latent-foundry-canary"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (CANARY,)


def npy(array: np.ndarray, *, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


def array_file(kind: str, array: np.ndarray) -> bytes:
    """An array as our own writer stores it, as others may, or as nobody should."""
    return {
        "ours": lambda: encode_npy(array),
        "version 2": lambda: npy(array, version=(2, 0)),
        "float32": lambda: npy(array.astype(np.float32)),
        "part": lambda: npy(array[:1]),
        "flat": lambda: npy(array.reshape(-1)),
        "column-major": lambda: npy(np.asfortranarray(array)),
        "cut off": lambda: npy(array)[:-1],
        "too long": lambda: npy(array) + b"\0",
        "pickle": lambda: npy(np.array([Bomb()], object)),
        "no array": lambda: b"moments",
    }[kind]()


ODD_KINDS = (
    "version 2",
    "float32",
    "part",
    "flat",
    "column-major",
    "cut off",
    "too long",
    "pickle",
    "no array",
)
ARRAYS = {"moments.npy": SHAPE, "flip.moments.npy": SHAPE, "text.npy": TEXT_SHAPE}
CAPTIONS = st.sampled_from([b"a dog", "ein Bär, ".encode() * 9, b" a cat \n", b"", b"\xff"])


@dataclass
class Source:
    """A sample as it is packed, and what happens to it afterwards."""

    members: dict[str, bytes]
    damaged: set[str] = field(default_factory=set)
    """Members of which a byte is changed on disk."""


@st.composite
def sources(draw: st.DrawFn) -> Source:
    """Half of the samples are as they should be, the others have one fault."""
    noise = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays = {name: noise.standard_normal(shape) for name, shape in ARRAYS.items()}
    members = {name: array_file("ours", array.astype(np.float16)) for name, array in arrays.items()}
    captions = draw(st.sampled_from([("txt",), ("cls",), ("txt", "cls")]))
    members |= {extension: draw(CAPTIONS) for extension in captions}
    order = draw(st.permutations([*members, "json"]))
    damaged = set()
    match draw(st.sampled_from(["none", "none", "none", "missing", "odd", "damaged"])):
        case "missing":
            del members[draw(st.sampled_from(["flip.moments.npy", "text.npy"]))]
        case "odd":
            name = draw(st.sampled_from(sorted(ARRAYS)))
            kind = draw(st.sampled_from(ODD_KINDS))
            members[name] = array_file(kind, arrays[name].astype(np.float16))
        case "damaged":
            damaged.add(draw(st.sampled_from(sorted(name for name in members if members[name]))))
        case _:
            pass
    members["json"] = b"{}"
    return Source({name: members[name] for name in order if name in members}, damaged)


def sound() -> Source:
    """A sample that always is usable."""
    moments = encode_npy(np.ones(SHAPE, np.float16))
    text = encode_npy(np.ones(TEXT_SHAPE, np.float16))
    return Source(
        {"moments.npy": moments, "flip.moments.npy": moments, "text.npy": text, "txt": b"sound"}
    )


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """Nothing here is to outlast a loss of power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


DrawByte = Callable[[int], int]
"""Draws a place among so many bytes."""


def write_set(folder: Path, shards: list[list[Source]], draw_byte: DrawByte) -> dict[str, Source]:
    """Pack the samples of each shard in a tar of the standard library's, then damage it."""
    entries, by_key = [], {}
    for number, samples in enumerate(shards):
        path = folder / f"{number:03d}.tar"
        with tarfile.open(path, "w") as tar:
            for place, source in enumerate(samples):
                key = f"{number}-ä-{place}"
                by_key[key] = source
                for extension, payload in source.members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
        registered = register_shard(folder, path.name, Kind.latents)
        for item in registered.rejected:
            refused = by_key.pop(item.key)
            assert expected(refused, False) is None or expected(refused, True) is None
        entries.append(registered.shard)
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if key in by_key and extension in by_key[key].damaged:
                    content[member.offset_data + draw_byte(member.size)] ^= 1
        path.write_bytes(content)
    info = LatentInfo(
        source_hash="",
        encoder="",
        transform="",
        shape=list(SHAPE[1:]),
        mean=[0.0] * 4,
        std=[1.0] * 4,
        flip=True,
        text_encoder="t",
    )
    Manifest(kind=Kind.latents, shards=entries, latents=info).save(folder)
    return by_key


def expected(source: Source, flip: bool) -> tuple[np.ndarray, np.ndarray, str] | None:
    """What numpy and str make of a sample; None if it must not be used."""
    moments_name = "flip.moments.npy" if flip else "moments.npy"
    caption_name = "txt" if "txt" in source.members else "cls"
    names = {moments_name, caption_name, "text.npy"}
    if not names <= source.members.keys() or names & source.damaged:
        return None
    streams = [io.BytesIO(source.members[name]) for name in (moments_name, "text.npy")]
    try:
        moments, text = (np.load(stream, allow_pickle=False) for stream in streams)
        caption = source.members[caption_name].decode(errors="replace").strip()
    except (ValueError, EOFError):
        return None
    if any(stream.read() for stream in streams):
        return None
    for array, shape in ((moments, SHAPE), (text, TEXT_SHAPE)):
        if array.dtype != np.float16 or array.shape != shape or not array.flags.c_contiguous:
            return None
    return moments, text, caption


def by_sample(epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
    return (epoch + index) % 3 == 1


def assert_row(batch: Batch, row: int, want: tuple[np.ndarray, np.ndarray, str]) -> None:
    moments, text, caption = want
    for name, array in (("moments", moments), ("text", text)):
        assert batch.arrays[name].dtype == torch.float16
        assert batch.arrays[name].is_contiguous()
        np.testing.assert_array_equal(batch.arrays[name][row].numpy(), array)
    assert batch.captions[row] == caption


def assert_gathered(shards: list[list[Source]], seed: int, draw_byte: DrawByte) -> None:
    """Read all samples by number and two epochs of the plan, and compare with `expected`."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "latents"
        folder.mkdir()
        by_key = write_set(folder, shards, draw_byte)
        keys = list(by_key)
        config = data_config(
            Path(root), store_text=True, max_rejected_share=1.0, lanes=1, shuffle_block=len(keys)
        )
        share = Share(seed=seed, global_batch=4, micro_batch=2)
        stream = LatentStream.open(config, share, Randomness(flip=by_sample))

        batch = stream.read(np.arange(len(keys)))
        plain = {key: want for key in keys if (want := expected(by_key[key], False)) is not None}
        assert batch.keys == [key for key in keys if key in plain]
        assert [keys[number] for number in batch.index] == batch.keys
        for row, key in enumerate(batch.keys):
            assert_row(batch, row, plain[key])
        assert {item.key for item in stream.quarantine.rejected} == set(keys) - set(plain)
        assert all(item.reason for item in stream.quarantine.rejected)

        for step, batches in enumerate(islice(stream.steps(0), 2 * len(keys) // 4)):
            for number, batch in enumerate(batches):
                flips = by_sample(batch.epoch, batch.index)
                for row, (index, flip) in enumerate(zip(batch.index, flips, strict=True)):
                    candidates = [index, *stream.plan.substitutes(step, 2 * number + row)]
                    wants = ((keys[i], expected(by_key[keys[i]], flip)) for i in candidates)
                    key, want = next((k, w) for k, w in wants if w is not None)
                    assert batch.keys[row] == key
                    assert_row(batch, row, want)
    assert not CANARY.exists()


@settings(deadline=None, max_examples=40)
@given(
    shards=st.lists(st.lists(sources(), min_size=1, max_size=6), min_size=1, max_size=3),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_a_gathered_batch_is_what_reading_one_by_one_gives(
    shards: list[list[Source]], seed: int, data: st.DataObject
) -> None:
    shards[0].insert(0, sound())
    assert_gathered(shards, seed, lambda size: data.draw(st.integers(0, size - 1)))


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_odd_arrays_are_read_or_rejected_one_by_one(name: str) -> None:
    array = np.ones(ARRAYS[name], np.float16)
    odd = [Source(sound().members | {name: array_file(kind, array)}) for kind in ODD_KINDS]
    assert_gathered([[sound(), *odd]], 0, lambda size: 0)


def test_sound_latents_are_not_decoded_one_by_one(
    latent_set: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(payload: bytes) -> Never:
        raise AssertionError("decoded by itself")

    config = latent_set(flip=True)
    share = Share(seed=0, global_batch=4, micro_batch=4)
    stream = LatentStream.open(config, share, Randomness(flip=by_sample))
    monkeypatch.setattr("data.streams.latents.decode_npy", decode)
    assert len(next(stream.steps(0))[0].captions) == 4


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 4, 32, 32)])
def test_a_layout_describes_the_files_of_the_writer(shape: tuple[int, ...]) -> None:
    layout = ArrayLayout.of(np.float16, shape)
    file = encode_npy(np.ones(shape, np.float16))
    assert (layout.dtype, layout.shape) == (np.float16, shape)
    assert len(file) == layout.file_bytes
    assert file.startswith(layout.header)
    assert len(file) - len(layout.header) == 2 * np.prod(shape, dtype=int)


def reader_of(config: DataConfig) -> ShardReader:
    return ShardReader(config.latents, Manifest.load(config.latents, option="data.latents"))


def test_members_are_those_of_each_sample(latent_set: DataSet) -> None:
    batch = reader_of(latent_set()).find(np.array([13, 2, 13, 7]))
    assert batch.keys() == [sample.key for sample in batch] == [f"{n:09d}" for n in (13, 2, 13, 7)]
    members = batch.members("txt", "cls")
    assert members.tolist() == [sample.shard.index["txt"][sample.row].item() for sample in batch]
    assert batch.members("cls").tolist() == [(0, 0, 0)] * 4
    texts, sound = batch.texts("txt", "cls").decode()
    assert texts == [f"caption {n}" for n in (13, 2, 13, 7)]
    assert sound.all()
    assert not batch.texts("cls").decode()[1].any()


def test_the_first_member_that_a_sample_has_is_taken(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "0.tar", Kind.latents) as writer:
        for key, extensions in (("a", ["txt"]), ("b", ["cls"]), ("c", ["cls", "txt"])):
            captions = {extension: f"{key} {extension}".encode() for extension in extensions}
            writer.write(key, {"moments.npy": b"", **captions})
    reader = ShardReader(str(tmp_path), Manifest(kind=Kind.latents, shards=[writer.shard]))
    batch = reader.find(np.arange(3))
    texts, sound = batch.texts("txt", "cls").decode()
    assert texts == ["a txt", "b cls", "c txt"]
    assert sound.all()


def test_a_missing_member_is_named(latent_set: DataSet) -> None:
    (sample,) = reader_of(latent_set()).find(np.array([3]))
    with pytest.raises(BadSampleError, match=r"no \.json"):
        sample.payload("json")
    assert not sample.has("json")
    assert sample.payload("txt") == b"caption 3"


def test_a_shard_that_is_cut_off_while_it_is_read_is_named(latent_set: DataSet) -> None:
    config = latent_set()
    reader = reader_of(config)
    batch = reader.find(np.arange(3))
    (tar, *_) = sorted(Path(config.latents).glob("*.tar"))
    stored = batch[2].payload("moments.npy")
    os.truncate(tar, 600)
    message = f"{tar.name} was cut off while it was read"
    with pytest.raises(OSError, match=message):
        batch[2].payload("txt")
    with pytest.raises(OSError, match=message):
        batch.texts("txt").decode()
    members = batch.members("moments.npy")
    array = decode_npy(stored)
    layout = ArrayLayout.of(array.dtype, array.shape)
    with pytest.raises(OSError, match=message):
        batch.copy(members, layout, np.empty((3, *layout.shape), layout.dtype))


def test_no_samples_are_no_batch(latent_set: DataSet) -> None:
    batch = reader_of(latent_set()).find(np.array([], np.int64))
    assert (len(batch), batch.keys(), batch.texts("txt").decode()[0]) == (0, [], [])
    layout = ArrayLayout.of(np.float16, (2, 3))
    none = np.empty((0, 2, 3), np.float16)
    assert batch.copy(batch.members("moments.npy"), layout, none).shape == (0,)
