"""Every file below a folder of images has its part; none is passed over in silence."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import SourceConfig
from data.shards.account import Fate, total
from data.shards.tar import UNPACK
from data.sources.caption_tables import TABLES
from data.sources.listing import Listing, list_files, own_folders, sort_files
from data.sources.sources import open_source
from data.sources.tars import UNPACK_SUFFIX
from tests.support.data_sets import data_config, png

NAMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "a/", "a/b/", "._", ".git/"]),
    st.sampled_from(["x", "y", "z.w", "captions", "metadata", "ü"]),
    st.sampled_from(["", ".png", ".JPG", ".txt", ".csv", ".psd", ".tar", ".pdf", ".jsonl"]),
)


@settings(max_examples=200, deadline=None)
@given(st.sets(NAMES, min_size=1, max_size=12))
def test_every_file_is_counted_once(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("raw")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    listing = list_files(folder, ())
    alone = total(listing.left_alone.entries(), Fate.left_alone)
    parts = len(listing.images) + len(listing.inputs) + len(listing.rejected) + alone
    assert parts == len(names)
    named = {*listing.images, *listing.inputs, *(item.key for item in listing.rejected)}
    named |= {name for entry in listing.left_alone.entries() for name in entry.examples}
    assert named <= names
    assert set(listing.images) == {
        name
        for name in names
        if name.endswith((".png", ".JPG")) and not name.rpartition("/")[2].startswith("._")
    }


def test_what_is_no_image_has_a_reason_and_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "more").symlink_to("closed")
    for name in ("scan.psd", "0.tar", "lonely.txt", "LICENCE", "._a.png", "a.png", "a.txt"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("labels.csv", "more.csv.gz"):
        (tmp_path / name).write_bytes(b"x")
    listing = list_files(tmp_path, ())
    assert (listing.images, listing.inputs) == (["a.png"], ["a.txt"])
    reasons = {item.key: item.reason for item in listing.rejected}
    assert reasons.keys() == {"scan.psd", "more"}
    assert "convert it" in reasons["scan.psd"] and "copy the folder" in reasons["more"]
    alone = {entry.examples[0]: entry.reason for entry in listing.left_alone.entries()}
    assert alone == {
        "0.tar": ".tar: for tars set data.source.kind=webdataset",
        "lonely.txt": ".txt: no image of this name",
        "LICENCE": "file without an extension: no picture and no caption",
        "._a.png": "attributes that a Mac wrote",
        "labels.csv": (
            ".csv: of tables, captions.csv and metadata.csv in data.source.path are read"
        ),
        "more.csv.gz": ".gz: no picture and no caption",
    }


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*TABLES, "captions_train2017.json"]),
    st.sampled_from([*UNPACK_SUFFIX]),
    st.sampled_from(["", "top/"]),
)
def test_a_compressed_table_is_refused_with_the_command_that_unpacks_it(
    table: str, suffix: str, top: str
) -> None:
    names = [f"{top}a.png", f"{top}{table}{suffix}"]
    with pytest.raises(ValueError, match=r"^data\.source\.path: .* unpack it once, `") as caught:
        sort_files(names, Listing(), inner=lambda name: name.removeprefix(top))
    assert str(caught.value).endswith(f"{UNPACK[UNPACK_SUFFIX[suffix]]} {names[1]}`")


def test_a_closed_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's answer is played: root, as which tests may run, may read every folder."""
    closed, scandir = tmp_path / "closed", os.scandir
    closed.mkdir()

    def refuse(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (item,) = list_files(tmp_path, ()).rejected
    assert (item.key, item.reason) == ("closed", "a folder that cannot be read (Permission denied)")


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("data.mdb", "lock.mdb", "0.tar"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"no images .* it holds .*LMDB is not read.*\.tar"):
        open_source(data_config(tmp_path / "out", source=SourceConfig(path=str(tmp_path))))


def test_own_data_below_the_source_is_not_its_part(tmp_path: Path) -> None:
    for name in ("a.png", "packed/train/sheet.png", "packed/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    data = data_config(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"data\.train: .* holds pictures of data\.source\.path"):
        own_folders(data, tmp_path)
    (tmp_path / "packed/train/sheet.png").rename(tmp_path / "packed/train/contact_sheet.png")
    listing = list_files(tmp_path, own_folders(data, tmp_path))
    assert listing.images == ["a.png", "packed/b.png"]
    assert total(listing.left_alone.entries(), Fate.left_alone) == 1
    with pytest.raises(ValueError, match=r"data\.source\.path: .* lies in data\.train"):
        own_folders(data, tmp_path / "packed/train")
