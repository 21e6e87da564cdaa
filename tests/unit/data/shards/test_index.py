"""The index of a tar: keys that every reader takes alike, and files that are no index."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards.codecs import BadSampleError, encode_npy
from data.shards.index import MAX_KEY_BYTES, MEMBER_DTYPE, check_places, decode_index, index_shard
from tests.support.tars import keys, reasons, tar_of


def index_of(members: list[tuple[str, bytes]]) -> np.ndarray:
    index, _ = index_shard(tar_of(members, tarfile.PAX_FORMAT), (("png",), ("txt",)))
    return index


def test_pickle_and_foreign_arrays_are_no_index() -> None:
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}], object), allow_pickle=True)
    for payload in (
        objects.getvalue(),
        encode_npy(np.zeros(3)),
        encode_npy(np.zeros(3, [("key", "S4"), ("png", "<i8")])),
        encode_npy(np.zeros(3, [("key", "S4"), ("exe", MEMBER_DTYPE)])),
        encode_npy(np.zeros(3, [("key", "<i8"), ("png", MEMBER_DTYPE)])),
        encode_npy(np.zeros((3, 1), [("key", "S4"), ("png", MEMBER_DTYPE)])),
        encode_npy(np.array([b"\xff"], [("key", "S4")])),
    ):
        with pytest.raises(BadSampleError):
            decode_index(payload)


@pytest.mark.parametrize("place", [(-512, 9, 0), (2048, 1, 0), (512, 2000, 0), (513, 9, 0)])
def test_an_index_of_members_outside_the_shard_is_refused(place: tuple[int, int, int]) -> None:
    index = np.zeros(2, [("key", "S4"), ("png", MEMBER_DTYPE)])
    index["png"] = [(512, 1536, 0), (0, 0, 0)]
    check_places(index, 2, 2048)
    with pytest.raises(BadSampleError, match="2 samples, not 3"):
        check_places(index, 3, 2048)
    index["png"][1] = place
    with pytest.raises(BadSampleError, match=r"\.png that is not in the shard"):
        check_places(index, 2, 2048)


@pytest.mark.parametrize("prefix", ["./", "././", "a/./"])
def test_two_spellings_of_one_path_are_one_sample(prefix: str) -> None:
    names = [f"{prefix}x.png", f"{prefix}x.txt"]
    (key,) = keys(index_of([(name, b"1") for name in names]))
    assert key == f"{prefix}x".replace("./", "")
    twice = [(name, b"1") for name in (*names, key + ".png", key + ".txt")]
    assert reasons(tar_of(twice, tarfile.PAX_FORMAT)) == {key: "two members .png"}


def test_a_key_leaves_room_for_the_extensions_of_latents() -> None:
    fitting, long = "k" * MAX_KEY_BYTES, "k" * (MAX_KEY_BYTES + 1)
    members = [
        (f"{key}.{extension}", b"1") for key in (fitting, long) for extension in ("png", "txt")
    ]
    assert keys(index_of(members)) == [fitting]
    assert reasons(tar_of(members, tarfile.PAX_FORMAT)) == {long: f"key over {MAX_KEY_BYTES} bytes"}


NAMES = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("./ \n"), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=250)
@given(st.lists(NAMES, max_size=6, unique=True), st.integers(0, 1100))
def test_a_key_of_a_tar_names_its_sample_in_the_next_tar_too(names: list[str], long: int) -> None:
    """Latent shards have the keys of image shards."""
    names = [*names, "k" * long + "é"]
    members = [(f"{name}.{extension}", b"1") for name in names for extension in ("png", "txt")]
    found = keys(index_of(members))
    extensions = ("flip.moments.npy", "png", "txt")
    again = [(f"{key}.{extension}", b"1") for key in found for extension in extensions]
    assert keys(index_of(again)) == found
