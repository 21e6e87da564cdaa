"""Tars of every kind: each sample has the bytes that Python's tarfile reads, or a reason."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards.index import index_shard, split_name
from data.shards.tar import BLOCK_BYTES
from tests.support.tars import keys, record, tar_of

REQUIRED = (("png",), ("txt",))
FORMATS: dict[str, Any] = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
Samples = dict[str, dict[str, bytes]]
"""Key → extension → payload."""


def as_we_read(shard: bytes) -> tuple[Samples, set[str]]:
    """Samples, and the keys of those that are left out."""
    index, rejected = index_shard(shard, REQUIRED)
    found: Samples = {}
    for key, row in zip(keys(index), index, strict=True):
        places = {name: row[name].item() for name in ("png", "txt")}
        found[key] = {
            name: shard[start : start + size] for name, (start, size, _) in places.items()
        }
    return found, {item.key for item in rejected if item.key}


def as_tarfile_reads(shard: bytes) -> tuple[Samples, set[str]]:
    """Complete samples of plain files and hard links, and the keys of all others."""
    found: Samples = {}
    refused: set[str] = set()
    with tarfile.open(fileobj=io.BytesIO(shard), ignore_zeros=True) as tar:
        for member in tar:
            if member.isdir():
                continue
            key, extension = split_name(member.name)
            plain = (member.isreg() and not member.issparse()) or member.islnk()
            if not plain or extension in found.setdefault(key, {}):
                refused.add(key)
                continue
            stream = tar.extractfile(member)
            assert stream is not None
            found[key][extension] = stream.read()
    refused |= {key for key, members in found.items() if members.keys() < {"png", "txt"}}
    return {key: members for key, members in found.items() if key not in refused}, refused


def padded(payload: bytes) -> bytes:
    return payload + bytes(-len(payload) % BLOCK_BYTES)


def with_checksum(header: bytes, *, signed: bool = False) -> bytes:
    summed = header[:148] + b" " * 8 + header[156:]
    total = sum(summed) - (256 * sum(byte > 127 for byte in summed) if signed else 0)
    return header[:148] + b"%06o\0 " % total + header[156:]


def member(name: str, payload: bytes, style: str, **facts: Any) -> bytes:
    """The headers and the payload of one member."""
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    for fact, value in facts.items():
        setattr(info, fact, value)
    if style != "v7":
        return info.tobuf(FORMATS[style], "utf-8", "surrogateescape") + padded(payload)
    info.type = b"\0" if info.type == tarfile.REGTYPE else info.type
    header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    return with_checksum(header[:257] + bytes(255), signed=True) + padded(payload)


def gnu_sparse(name: str, holes: int) -> bytes:
    """A file of bytes with holes between them, in GNU's older format; many need more blocks."""
    entries = [b"%011o\0%011o\0" % (number * 2 * BLOCK_BYTES, 1) for number in range(holes)]
    payload = (b"x" + bytes(BLOCK_BYTES - 1)) * holes
    header = bytearray(member(name, payload, "gnu", type=tarfile.GNUTYPE_SPARSE)[:BLOCK_BYTES])
    header[386:482] = b"".join(entries[:4]).ljust(96, b"\0")
    header[482] = holes > 4
    header[483:495] = b"%011o\0" % (holes * 2 * BLOCK_BYTES)
    more = b""
    for start in range(4, holes, 21):
        block = b"".join(entries[start : start + 21]).ljust(504, b"\0")
        more += block + bytes([start + 21 < holes]) + bytes(7)
    return with_checksum(bytes(header)) + more + payload


def pax_sparse(name: str) -> bytes:
    facts = {"major": "1", "minor": "0", "name": name, "realsize": "3"}
    records = {f"GNU.sparse.{key}": value for key, value in facts.items()}
    return member("GNUSparseFile.1/x", padded(b"1\n0\n3\n") + b"abc", "pax", pax_headers=records)


RAW = st.text(
    st.characters(max_codepoint=0x24F) | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
)
RECORDS = st.dictionaries(
    st.sampled_from(["SCHILY.xattr.user.a", "LIBARCHIVE.xattr.b", "mtime", "uname", "VENDOR.x"]),
    RAW,
    max_size=3,
)
"""Attributes of any bytes; a byte that is no text is half of a surrogate pair here."""
STEMS = st.text(st.sampled_from("abcü01 "), min_size=1, max_size=9)
KINDS = st.sampled_from(["file"] * 12 + ["hard", "soft", "folder", "sparse"])


@st.composite
def archives(draw: st.DrawFn, part: int) -> bytes:
    """A tar of one format, whose members come in any order."""
    style = draw(st.sampled_from(["v7", "ustar", "gnu", "pax"]))
    long = (
        ""
        if style == "v7"
        else draw(st.sampled_from(["", "long/" * (45 if style == "pax" else 25)]))
    )
    prefix = f"{draw(st.sampled_from(['', './', 'a/./']))}{long}{part}"
    stems = draw(st.lists(STEMS, min_size=1, max_size=4, unique=True))
    names = draw(
        st.permutations([f"{prefix}{stem}.{end}" for stem in stems for end in ("png", "txt")])
    )
    records = draw(RECORDS)
    whole = member("./x/", b"", style, type=tarfile.DIRTYPE)
    earlier: list[str] = []
    for name in names:
        kind, payload = draw(KINDS), draw(st.binary(max_size=700))
        target = draw(st.sampled_from(earlier)) if earlier else "nowhere.png"
        if kind == "sparse" and style in ("gnu", "pax"):
            whole += (
                gnu_sparse(name.rpartition("/")[2], draw(st.integers(1, 60)))
                if style == "gnu"
                else pax_sparse(name)
            )
            continue
        links = {"hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE}
        if kind in links and earlier and (style in ("gnu", "pax") or len(target) < 100):
            whole += member(name, b"", style, type=links[kind], linkname=target)
            continue
        earlier.append(name)
        whole += member(name, payload, style, pax_headers=records if style == "pax" else {})
    return whole


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_a_tar_of_any_kind_is_read_as_tarfile_reads_it(data: st.DataObject) -> None:
    parts = [data.draw(archives(number)) for number in range(data.draw(st.integers(1, 3)))]
    shard = bytes(2 * BLOCK_BYTES).join(parts) + bytes(data.draw(st.integers(0, 3)) * BLOCK_BYTES)
    assert as_we_read(shard) == as_tarfile_reads(shard)


@pytest.mark.parametrize("style", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_a_tar_of_the_tar_program_is_read_as_tarfile_reads_it(tmp_path: Path, style: str) -> None:
    tar = shutil.which("tar")
    assert tar is not None
    raw = tmp_path / "raw"
    deep = raw / "deep"
    deep.mkdir(parents=True)
    for name in ("a", "b", f"deep/{'c' * 70}"):
        (raw / f"{name}.png").write_bytes(name.encode() * 300)
        (raw / f"{name}.txt").write_text(name)
    (raw / "linked.png").hardlink_to(raw / "a.png")
    (raw / "linked.txt").hardlink_to(raw / "b.txt")
    (raw / "soft.png").symlink_to("a.png")
    (raw / "soft.txt").write_text("soft")
    with (raw / "holes.png").open("wb") as file:
        for place in range(0, 60 * 2**16, 2**17):
            file.seek(place)
            file.write(b"x")
    (raw / "holes.txt").write_text("holes")
    sparse = [] if style in ("v7", "ustar") else ["--sparse"]
    command = [tar, f"--format={style}", *sparse, "-cf", str(tmp_path / "0.tar"), "."]
    subprocess.run(command, cwd=raw, check=True)
    shard = (tmp_path / "0.tar").read_bytes()
    samples, refused = as_we_read(shard)
    assert (samples, refused) == as_tarfile_reads(shard)
    assert samples.keys() >= {"a", "b", f"deep/{'c' * 70}", "linked"}
    assert samples["linked"] == {"png": samples["a"]["png"], "txt": b"b"}
    assert "soft" in refused
    assert ("holes" in refused) == bool(sparse)


def test_a_hard_link_to_nowhere_costs_its_sample() -> None:
    shard = tar_of([("a.png", b"x"), ("a.txt", b"y")])[: 4 * BLOCK_BYTES]
    for number, target in enumerate(("/etc/passwd", "2.txt", "later.png")):
        shard += member(f"{number}.png", b"", "gnu", type=tarfile.LNKTYPE, linkname=target)
    shard += member("later.png", b"1", "gnu") + member("later.txt", b"2", "gnu") + bytes(1024)
    index, rejected = index_shard(shard, REQUIRED)
    assert keys(index) == ["a", "later"]
    assert {item.reason for item in rejected} == {"hard link to a member that is not in the tar"}
    assert len(rejected) == 3


def test_global_records_hold_for_the_members_after_them() -> None:
    """git archive writes its commit into one; sizes that all members share may stand there, too."""
    pairs = b"".join(member(name, b"abc", "ustar") for name in ("a.png", "a.txt")) + bytes(1024)
    expected = ({"a": {"png": b"abc", "txt": b"abc"}}, set())
    records = record("comment", "a commit id") + b"12 uname=\xff\xfe\n"
    shard = member("pax_global_header", records, "ustar", type=tarfile.XGLTYPE) + pairs
    assert as_we_read(shard) == as_tarfile_reads(shard) == expected
    sizes = member("pax_global_header", b"10 size=3\n", "ustar", type=tarfile.XGLTYPE)
    empty = member("", b"", "ustar")[124:136]
    unsized = b"".join(
        with_checksum(block[:124] + empty + block[136:]) if block[257:262] == b"ustar" else block
        for block in (pairs[start : start + 512] for start in range(0, len(pairs), 512))
    )
    assert as_we_read(sizes + unsized) == expected
