"""A hostile corpus, packed and streamed: nothing runs, memory stays bounded, all is accounted for.

Every kind of attack is one sample among sound ones, in tars as a stranger may publish them.
"""

import dataclasses
import io
import json
import multiprocessing
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, FilterConfig, Missing, SourceConfig, SourceKind
from data.order.batches import Share
from data.shards.codecs import encode_npy
from data.shards.manifest import FILE_NAME, Kind, LatentInfo, Manifest, Rejected
from data.shards.register import register_shard
from data.streams.images import ImageStream
from data.streams.latents import LatentStream
from tests.support.data_sets import DataSet, data_config, moments, png
from tests.support.hostile import claim
from trainer.cli import load_config
from trainer.pack.job import pack

GROWTH_LIMIT_BYTES = 300 * 2**20
SOUND = 12
Members = dict[str, bytes]


class Executed:
    """Unpickled, it leaves a canary."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self._canary, "executed"))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_bomb(side: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(2**24), 1))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A sound picture with a comment that unpacks to 16 MiB."""
    sound = png(0)
    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**24), 1))
    return sound[:33] + comment + sound[33:]


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(2**24))
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, payload: bytes = b"", **facts: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    for fact, value in facts.items():
        setattr(info, fact, value)
    tar.addfile(info, io.BytesIO(payload))


def pair(image: bytes = b"", caption: bytes = b"t", **more: bytes) -> Members:
    return {"png": image or png(1), "txt": caption, **more}


def harmless_looking(canary: Path) -> dict[str, Members]:
    """Samples that stay, for what is hostile in them is never read."""
    code = f"open({str(canary)!r}, 'w').write('executed')".encode()
    unpickled = pickle.dumps(Executed(canary))
    objects = io.BytesIO()
    np.save(objects, np.array([Executed(canary)], object), allow_pickle=True)
    names = ("pkl", "pickle", "pth", "pyd", "py", "pt", "__url__", "cbor", "sh", "zip", "gz")
    bodies = dict.fromkeys(names, unpickled) | {"py": code, "sh": code, "zip": zip_bomb()}
    bodies |= {"gz": zlib.compress(bytes(2**24), 1), "npy": objects.getvalue()}
    bodies |= {"moments.npy": objects.getvalue(), "pyd": b"import os\n" + code}
    return {f"with_{name.replace('.', '_')}": pair(**{name: body}) for name, body in bodies.items()}


def refused_when_packed(canary: Path) -> dict[str, tuple[Members, str]]:
    """Samples whose JSON is asked for by a filter, and the reasons for refusing them."""
    return {
        "deep": (pair(json=b"[" * 10**6), "JSON cannot be read (RecursionError)"),
        "nested": (pair(json=b'{"a":' * 60 + b"1" + b"}" * 60), "JSON is nested deeper than 32"),
        "vast": (pair(json=b" " * 10**8), f"JSON of {10**8} bytes is over {2**20}"),
        "digits": (pair(json=b'{"x":' + b"9" * 10**5 + b"}"), "JSON cannot be read (ValueError)"),
        "pickled": (pair(json=pickle.dumps(Executed(canary))), "JSON cannot be read (Unic"),
        "list": (pair(json=b"[1]"), "JSON is not an object"),
    }


def refused_when_read(canary: Path) -> dict[str, tuple[Members, str]]:
    """Samples that an index cannot tell from sound ones, and the reasons for refusing them."""
    return {
        "bomb": (pair(png_bomb(30_000)), "image cannot be decoded (DecompressionBombError)"),
        "smaller_bomb": (pair(png_bomb(9_000)), "image of 9000x9000 is over"),
        "comment": (pair(text_bomb()), "image cannot be decoded (ValueError)"),
        "pickle_as_png": (pair(pickle.dumps(Executed(canary))), "image cannot be decoded"),
        "zip_as_png": (pair(zip_bomb()), "image cannot be decoded"),
        "svg_as_png": (pair(b"<svg onload='x'/>"), "image cannot be decoded"),
        "novel": (pair(caption=b"a" * 2**20), "text of 1048576 bytes is over"),
    }


def odd_members(tar: tarfile.TarFile) -> dict[str, str]:
    """Members that no sample may have, and the reasons for refusing them, by key."""
    for key, kind in (("hard", tarfile.LNKTYPE), ("soft", tarfile.SYMTYPE)):
        add(tar, f"{key}.png", type=kind, linkname="/etc/passwd")
        add(tar, f"{key}.txt", b"t")
    add(tar, "device.png", type=tarfile.CHRTYPE)
    add(tar, "fifo.png", type=tarfile.FIFOTYPE)
    add(tar, "gnu_sparse.png", type=tarfile.GNUTYPE_SPARSE)
    add(tar, "pax_sparse.png", png(1), pax_headers={"GNU.sparse.major": "1"})
    for name in ("/etc/cron.d/absolute.png", "../../up.png", "a/../../b/up.png"):
        add(tar, name, png(1))
    for payload in (png(1), png(2)):
        add(tar, "twice.png", payload)
    add(tar, "twice.txt", b"t")
    add(tar, f"{'long' * 5000}.png", png(1))
    add(tar, "header.png", png(1), pax_headers={"comment": "x" * 2**23})
    add(tar, "big.png", b"")
    out, links = "path leads out of the shard", "tar member of type"
    return {
        "hard": "hard link",
        "soft": "symbolic link",
        "device": links,
        "fifo": links,
        "gnu_sparse": "sparse member",
        "pax_sparse": "sparse member",
        "/etc/cron.d/absolute": out,
        "../../up": out,
        "a/../../b/up": out,
        "twice": "two members .png",
        "long" * 5000: "name over 1024 bytes",
        "header": "extended header over the size limit",
        "big": "member over",
    }


def sound_samples(tar: tarfile.TarFile, start: int) -> None:
    for number in range(start, start + SOUND // 3):
        add(tar, f"sound{number:02d}.png", png(number))
        add(tar, f"sound{number:02d}.txt", f"caption {number}".encode())


def build(folder: Path, canary: Path) -> dict[str, str]:
    """Write the corpus; return the reasons that packing is to give, by key."""
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        sound_samples(tar, 0)
        reasons = odd_members(tar)
        sound_samples(tar, SOUND // 3)
    whole = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(claim(whole, b"big.png", 100 * 2**30))
    late = {key: members for key, (members, _) in refused_when_read(canary).items()}
    packed = {key: members for key, (members, _) in refused_when_packed(canary).items()}
    reasons |= {key: reason for key, (_, reason) in refused_when_packed(canary).items()}
    with tarfile.open(folder / "1.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in (harmless_looking(canary) | packed | late).items():
            for extension, payload in members.items():
                add(tar, f"{key}.{extension}", payload)
        add(tar, "unnamed\udcff.png", png(1))
        sound_samples(tar, 2 * SOUND // 3)
    reasons["unnamed\ufffd"] = "name is not UTF-8 text"
    return reasons


def hostile_arrays(canary: Path) -> dict[str, tuple[bytes, str]]:
    objects = io.BytesIO()
    np.save(objects, np.array([Executed(canary)], object), allow_pickle=True)

    def header(descr: str, shape: str) -> bytes:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text

    vast = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**23) + bytes(2**23)
    return {
        "objects": (objects.getvalue(), "not plain row-major data"),
        "pickled": (pickle.dumps(Executed(canary)), "array header"),
        "nothing": (b"", "array header cannot be read"),
        "code": (header("__import__('os').abort()", "()"), "array header cannot be read"),
        "nobody": (header("'|S0'", "(10**9,)"), "array header cannot be read"),
        "empty": (header("'|S0'", "(1000000000,)"), "not plain row-major data"),
        "claims": (header("'<f2'", "(1000000, 1000000)"), "does not fit"),
        "vast": (vast, "array header of"),
        "other": (encode_npy(np.zeros((2, 4, 2, 3), np.float16)), "of float16 (2, 4, 2, 3)"),
    }


def build_latents(folder: Path, canary: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for key, (payload, _) in hostile_arrays(canary).items():
            add(tar, f"{key}.moments.npy", payload)
            add(tar, f"{key}.txt", b"t")
        for number in range(SOUND):
            add(tar, f"sound{number:02d}.moments.npy", encode_npy(moments(number)))
            add(tar, f"sound{number:02d}.txt", b"t")
    registered = register_shard(folder, "0.tar", Kind.latents)
    info = LatentInfo(
        source_hash="", encoder="", transform="", shape=[4, 2, 2], mean=[0.0] * 4, std=[1.0] * 4
    )
    Manifest(kind=Kind.latents, shards=[registered.shard], latents=info).save(folder)


def memory_bytes(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


def image_stream(data: DataConfig) -> ImageStream:
    return ImageStream.open(data, "train", Share(seed=0, global_batch=4, micro_batch=4))


def pack_and_stream(data: DataConfig, answer: Path) -> None:
    """Runs alone in a process, so that its peak of memory is that of reading the corpus."""
    config = load_config(["+experiment=emoji_autoencoder", "pack.max_rejected=1"])
    warm_up = dataclasses.replace(data, train=f"{data.dir}/warm_up", filters=[])
    warm_up.source = SourceConfig(path=f"{data.dir}/warm")
    pack(dataclasses.replace(config, data=warm_up))
    image_stream(warm_up).read(np.arange(1))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_bytes("VmRSS")

    pack(dataclasses.replace(config, data=data))
    found = {}
    images = image_stream(data)
    for stream in (images, LatentStream.open(data, images.share)):
        batch = stream.read(np.arange(stream.num_samples))
        steps = stream.steps(0)
        visited = [key for step in islice(steps, 20) for part in step for key in part.keys]
        steps.close()
        found[stream.manifest.kind] = {
            "keys": batch.keys,
            "captions": batch.captions,
            "visited": visited,
            "rejected": {item.key: item.reason for item in stream.quarantine.rejected},
        }
    growth = memory_bytes("VmHWM") - before
    answer.write_text(json.dumps({"growth_bytes": growth, **found}))


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, Any], dict[str, str]]]:
    """The folder, what was read, and what packing had to refuse."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "warm").mkdir()
    (root / "warm" / "0.png").write_bytes(png(0))
    (root / "warm" / "0.txt").write_text("x")
    reasons = build(root / "tars", root / "canary")
    build_latents(root / "latents", root / "canary")
    rule = FilterConfig(name="score", min=0, missing=Missing.keep)
    data = data_config(root, filters=[rule], max_rejected_share=1.0, shuffle_block=50)
    data.source = SourceConfig(kind=SourceKind.webdataset, path=f"{root}/tars", workers=1)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=pack_and_stream, args=(data, root / "answer.json"))
    process.start()
    process.join()
    assert process.exitcode == 0
    yield root, json.loads((root / "answer.json").read_text()), reasons
    assert not (root / "canary").exists()


def test_nothing_was_executed(corpus: tuple[Path, dict[str, Any], dict[str, str]]) -> None:
    root, _, _ = corpus
    assert not (root / "canary").exists()
    Executed(root / "canary").__reduce__()[0](*Executed(root / "canary").__reduce__()[1])
    assert (root / "canary").exists(), "the canary itself works"
    (root / "canary").unlink()


def test_memory_stays_bounded(corpus: tuple[Path, dict[str, Any], dict[str, str]]) -> None:
    assert corpus[1]["growth_bytes"] < GROWTH_LIMIT_BYTES


def test_what_packing_refuses_is_listed_with_its_reason_and_counted(
    corpus: tuple[Path, dict[str, Any], dict[str, str]],
) -> None:
    root, _, expected = corpus
    lines = (root / "train" / "rejected.jsonl").read_text("utf-8").splitlines()
    rejected = [Rejected(**json.loads(line)) for line in lines]
    found = {item.key: item.reason for item in rejected}
    assert found.keys() == expected.keys()
    assert not [key for key, reason in expected.items() if reason not in found[key]]
    manifest = Manifest.load(root / "train", option="data.train")
    assert sum(manifest.rejected.values()) == len(expected)
    assert {item.shard for item in rejected} == {"0.tar", "1.tar"}


def assert_rejected(answer: dict[str, Any], expected: dict[str, tuple[Any, str]]) -> None:
    """Exactly these samples were rejected, each for a reason with these words."""
    assert answer["rejected"].keys() == expected.keys()
    assert not [key for key, (_, why) in expected.items() if why not in answer["rejected"][key]]


def test_what_reading_refuses_is_in_quarantine_and_sound_samples_survive(
    corpus: tuple[Path, dict[str, Any], dict[str, str]],
) -> None:
    root, answer, _ = corpus
    images = answer["images"]
    assert_rejected(images, refused_when_read(root / "canary"))
    sound = [f"sound{number:02d}" for number in range(SOUND)]
    assert sorted(images["keys"]) == sorted([*sound, *harmless_looking(root / "canary")])
    captions = dict(zip(images["keys"], images["captions"], strict=True))
    assert [captions[key] for key in sound] == [f"caption {number}" for number in range(SOUND)]
    assert set(images["visited"]) <= set(images["keys"])


def test_hostile_arrays_are_in_quarantine_and_sound_ones_survive(
    corpus: tuple[Path, dict[str, Any], dict[str, str]],
) -> None:
    latents = corpus[1]["latents"]
    assert_rejected(latents, hostile_arrays(corpus[0] / "canary"))
    assert latents["keys"] == [f"sound{number:02d}" for number in range(SOUND)]
    assert set(latents["visited"]) == set(latents["keys"])


@pytest.mark.parametrize(
    "scheme", ["pipe:touch {}", "pipe://touch {}", "ssh://host/{}", "local://{}", "zip://{}"]
)
def test_schemes_off_the_list_are_refused_wherever_they_stand(
    image_set: DataSet, tmp_path: Path, scheme: str
) -> None:
    canary = tmp_path / "canary"
    location = scheme.format(canary)
    config = load_config(["+experiment=emoji_autoencoder", "pack.max_rejected=1"])
    data = image_set(samples=5)
    source = SourceConfig(kind=SourceKind.webdataset, path=f"{location}.tar")
    packed = dataclasses.replace(data, source=source, train=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"data\.source\.path: .* is not allowed"):
        pack(dataclasses.replace(config, data=packed))
    path = Path(data.train) / FILE_NAME
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"base": location}))
    with pytest.raises(ValueError, match="is not allowed"):
        image_stream(data).read(np.arange(5))
    with pytest.raises(ValueError, match="is not allowed"):
        image_stream(dataclasses.replace(data, train=location))
    document["shards"][0]["name"] = location
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="leads out of the data set"):
        image_stream(data)
    time.sleep(0.1)  # a shell would need a moment
    assert not canary.exists()
