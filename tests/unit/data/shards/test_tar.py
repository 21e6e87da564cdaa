"""Scanning tars: equal to tarfile's reading of sound shards, and loud about all others."""

import io
import random
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards.codecs import encode_npy
from data.shards.index import decode_index, index_shard
from data.shards.tar import BLOCK_BYTES, MAX_EXTENDED_BYTES, MAX_MEMBER_BYTES, scan
from tests.support.hostile import claim
from tests.support.tars import REQUIRED, keys, reasons, record, tar_of


def samples(count: int) -> list[tuple[str, bytes]]:
    return [
        (f"{number:04d}.{extension}", f"{extension} of {number}".encode() * (1 + 200 * number))
        for number in range(count)
        for extension in ("png", "txt")
    ]


names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/."), min_size=1, max_size=60),
    min_size=1,
    max_size=4,
).map("/".join)


@settings(deadline=None, max_examples=80)
@given(
    st.dictionaries(names, st.tuples(st.binary(max_size=1500), st.binary(max_size=40)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_a_sound_shard_is_indexed_as_tarfile_reads_it(
    content: dict[str, tuple[bytes, bytes]], tar_format: int
) -> None:
    shard = tar_of(
        [
            (f"{key}.{extension}", payload)
            for key, payloads in content.items()
            for extension, payload in zip(("png", "txt"), payloads, strict=True)
        ],
        tar_format,
    )
    index, rejected = index_shard(shard, REQUIRED)
    assert rejected == []
    assert keys(index) == list(content)
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        expected = {member.name: (member.offset_data, member.size) for member in tar}
    found = {
        f"{key}.{extension}": (int(row[extension]["offset"]), int(row[extension]["size"]))
        for key, row in zip(keys(index), index, strict=True)
        for extension in ("png", "txt")
    }
    assert found == expected
    np.testing.assert_array_equal(decode_index(encode_npy(index)), index)


def test_a_shard_cut_off_anywhere_is_never_silently_short() -> None:
    shard = tar_of(samples(3))
    payload_end = len(shard.rstrip(b"\0")) // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES
    for length in range(0, len(shard), 37):
        index, rejected = index_shard(shard[:length], REQUIRED)
        if length < payload_end + 2 * BLOCK_BYTES:
            assert any("cut off" in item.reason for item in rejected), length
        else:
            assert (len(index), rejected) == (3, [])


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_what_survives_a_cut_is_whole_and_what_does_not_is_told(tar_format: int) -> None:
    """512 random places; long names and non-ASCII ones bring extended headers with them."""
    original = {
        f"{folder}{name}": payload
        for folder in (
            "",
            f"ü{'x' * 60}/{'y' * 60}/" if tar_format != tarfile.USTAR_FORMAT else "z/",
        )
        for name, payload in samples(4)
    }
    shard = tar_of(list(original.items()), tar_format)
    for length in random.Random(0).sample(range(len(shard)), 512):
        cut = shard[:length]
        index, rejected = index_shard(cut, REQUIRED)
        for row, key in zip(index, keys(index), strict=True):
            for extension in ("png", "txt"):
                offset, size, _ = row[extension].item()
                assert cut[offset : offset + size] == original[f"{key}.{extension}"]
        assert rejected or len(index) == len(original) // 2, length


def test_any_changed_byte_of_a_header_costs_its_sample_only_and_is_told() -> None:
    shard = tar_of(samples(3))
    victim = shard.index(b"0001.png")
    told = []
    for position in range(BLOCK_BYTES):
        damaged = bytearray(shard)
        damaged[victim + position] ^= 0xFF
        index, rejected = index_shard(bytes(damaged), REQUIRED)
        assert set(keys(index)) <= {"0000", "0001", "0002"}
        assert {"0000", "0002"} <= set(keys(index))
        told.append(bool(rejected))
    # the checksum field ends in a NUL and a space that carry nothing
    assert [position for position, seen in enumerate(told) if not seen] == [155]


def test_zeros_in_the_middle_are_told() -> None:
    shard = bytearray(tar_of(samples(3)))
    victim = shard.index(b"0001.png")
    shard[victim : victim + BLOCK_BYTES] = bytes(BLOCK_BYTES)
    found = reasons(bytes(shard))
    assert "zeros" in found[""]
    assert found["0001"] == "no png or jpg"


def test_joined_shards_are_read_to_the_end() -> None:
    index, rejected = index_shard(
        tar_of(samples(2)) + tar_of([("x.png", b"a"), ("x.txt", b"b")]), REQUIRED
    )
    assert keys(index) == ["0000", "0001", "x"]
    assert "more follows" in rejected[0].reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.GNUTYPE_SPARSE, "sparse member"),
        (tarfile.FIFOTYPE, "tar member of type"),
        (tarfile.CHRTYPE, "tar member of type"),
    ],
)
def test_members_that_are_not_plain_files_cost_their_sample(kind: bytes, reason: str) -> None:
    shard = tar_of([("a.png", b"x"), ("a.txt", b"y")])
    odd = tar_of([("b.png", b""), ("b.txt", b"")], type=kind, linkname="a.png")
    ending = tar_of([("c.png", b"x"), ("c.txt", b"y")])
    body = shard.rstrip(b"\0")
    body += bytes(-len(body) % BLOCK_BYTES) + odd[: 2 * BLOCK_BYTES] + ending
    index, _ = index_shard(body, REQUIRED)
    assert keys(index) == ["a", "c"]
    assert reason in reasons(body)["b"]


def test_pax_sparse_members_are_refused() -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "a.png"}
    shard = tar_of([("a.png", b"x")], tarfile.PAX_FORMAT, pax_headers=headers)
    assert reasons(shard)["a"].startswith("sparse member")


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "x/../../a.png"])
def test_paths_that_lead_out_are_refused(name: str) -> None:
    shard = tar_of([(name, b"x"), (name.replace("png", "txt"), b"y")])
    index, _ = index_shard(shard, REQUIRED)
    assert len(index) == 0
    assert set(reasons(shard).values()) == {"path leads out of the shard"}


def test_a_member_twice_costs_its_sample() -> None:
    shard = tar_of(
        [("a.png", b"1"), ("a.txt", b"2"), ("b.png", b"3"), ("b.txt", b"4"), ("a.png", b"5")]
    )
    index, _ = index_shard(shard, REQUIRED)
    assert keys(index) == ["b"]
    assert reasons(shard) == {"a": "two members .png"}


def test_samples_without_image_or_caption_and_members_off_the_list() -> None:
    shard = tar_of(
        [("a.png", b"1"), ("b.txt", b"2"), ("c.jpg", b"3"), ("c.txt", b"4"), ("c.pyd", b"payload")]
    )
    index, _ = index_shard(shard, REQUIRED)
    assert keys(index) == ["c"]
    assert index.dtype.names == ("key", "jpg", "txt")
    assert reasons(shard) == {"a": "no txt", "b": "no png or jpg"}


def test_names_that_are_not_utf8_are_refused_and_hidden_files_are_no_samples() -> None:
    shard = bytearray(
        tar_of([("._a.png", b"0"), ("README", b"0"), ("a.png", b"1"), ("a.txt", b"2")])
    )
    assert reasons(bytes(shard)) == {}
    victim = shard.index(b"a.txt")
    shard[victim] = 0xFF
    header = bytes(shard[victim : victim + BLOCK_BYTES])
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    shard[victim + 148 : victim + 156] = b"%06o\0 " % total
    assert reasons(bytes(shard)) == {"\ufffd": "name is not UTF-8 text", "a": "no txt"}


def extended(body: bytes, name: str = "a.png") -> bytes:
    """A PAX header with this body, and the file it speaks of."""
    header = tar_of([("x", body)], type=tarfile.XHDTYPE)
    header = header[: BLOCK_BYTES + -(-len(body) // BLOCK_BYTES) * BLOCK_BYTES]
    return header + tar_of([(name, b"x"), (name.replace("png", "txt"), b"y")])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (record("size", "9" * 5000), "damaged extended header"),
        (record("size", "9" * 4000), "member over 1073741824 bytes"),
        (record("path", "b\0.png"), "name is not UTF-8 text"),
        (record("path", f"{'b' * 1100}.png"), "name over 1024 bytes"),
        (record("comment", "x" * 2**21), "extended header over the size limit"),
        (record("comment", "x") + b"junk\n", "damaged extended header"),
        (b"-5 path=b.png\n", "damaged extended header"),
        (b"99999999 path=b.png\n", "damaged extended header"),
    ],
)
def test_hostile_extended_headers_cost_their_sample(body: bytes, reason: str) -> None:
    shard = extended(body)
    assert [found for found in reasons(shard).values() if reason in found]
    assert len(index_shard(shard, REQUIRED)[0]) == 0


def test_thousands_of_records_are_read_in_one_pass() -> None:
    body = record("path", "b.png") + record("k", "") * 200_000
    assert len(body) > MAX_EXTENDED_BYTES * 0.9
    assert reasons(extended(body)) == {"b": "no txt", "a": "no png or jpg"}


def test_folders_are_no_members() -> None:
    with_folders = io.BytesIO()
    with tarfile.open(fileobj=with_folders, mode="w") as tar:
        for name in ("./", "./deep/", "../out/"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name in ("./deep/a.png", "./deep/a.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    index, rejected = index_shard(with_folders.getvalue(), REQUIRED)
    assert (keys(index), rejected) == (["deep/a"], [])


def test_a_member_without_a_name_is_told() -> None:
    assert reasons(tar_of([("", b"x"), ("a.png", b"1"), ("a.txt", b"2")])) == {
        "": "member without a name"
    }


def test_a_lying_size_is_told() -> None:
    shard = claim(tar_of(samples(3)), b"0001.png", MAX_MEMBER_BYTES // 2)
    assert "cut off" in reasons(shard)[""]
    assert keys(index_shard(shard, REQUIRED)[0]) == ["0000"]


@pytest.mark.parametrize("size", [MAX_MEMBER_BYTES + 1, 100 * 2**30, 2**80])
def test_an_absurd_size_costs_its_sample_only(size: int) -> None:
    shard = claim(tar_of(samples(3)), b"0001.png", size)
    assert reasons(shard) == {"0001": f"member over {MAX_MEMBER_BYTES} bytes"}
    assert keys(index_shard(shard, REQUIRED)[0]) == ["0000", "0002"]


def test_an_absurd_extended_header_is_told_and_what_follows_is_found() -> None:
    shard = claim(extended(record("path", "b.png")), b"x", 100 * 2**30)
    index, rejected = index_shard(shard, REQUIRED)
    assert keys(index) == ["a"]
    assert [item.reason for item in rejected] == ["extended header over the size limit"]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_bytes_break_the_scanner(data: st.DataObject) -> None:
    shard = bytearray(tar_of(samples(2), data.draw(st.sampled_from([0, 1, 2]))))
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(shard) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=64))
        shard[start : start + len(patch)] = patch
    shard = bytes(shard[: data.draw(st.integers(0, len(shard)))])
    for member in scan(shard):
        assert member.problem or member.offset + member.size <= len(shard)
    index_shard(shard, REQUIRED)
