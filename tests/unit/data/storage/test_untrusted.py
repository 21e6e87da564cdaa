"""Files of strangers: regular ones of the folder are read, all others are refused at once."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage.untrusted import UnsafeFileError, open_append, open_regular, read_file, read_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    return folder


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


IRREGULAR: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    IRREGULAR[kind](path)
    for below in (None, tmp_path):
        with pytest.raises(UnsafeFileError, match=str(path)):
            open_regular(path, below=below)


OUTWARD = {
    "file": ("inner/x", "../../secret"),
    "absolute": ("inner/x", "/etc/hostname"),
    "folder": ("x", ".."),
    "link to a link": ("x", "y"),
}


@pytest.mark.parametrize("kind", OUTWARD)
def test_links_that_lead_out_are_not_followed(folder: Path, kind: str) -> None:
    name, target = OUTWARD[kind]
    (folder / "y").symlink_to("../secret")
    (folder / name).symlink_to(target)
    path = folder / "x" / "secret" if kind == "folder" else folder / name
    assert read_file(path, limit=100)
    with pytest.raises(UnsafeFileError, match=f"a link leads out of {folder}"):
        read_file(path, limit=100, below=folder)
    with pytest.raises(UnsafeFileError, match="leads out"):
        read_file(folder / ".." / "secret", limit=100, below=folder)


def test_links_inside_of_the_folder_are_followed(folder: Path) -> None:
    (folder / "file").symlink_to("inner/file")
    (folder / "again").symlink_to("inner")
    linked = folder.with_name("linked")
    linked.symlink_to(folder)
    for path in (folder / "file", folder / "again" / "file", linked / "inner" / "file"):
        assert read_text(path, limit=6, below=linked) == "inside"


@pytest.mark.parametrize("part", ["folder", "file"])
def test_a_link_that_appears_meanwhile_is_not_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The path is sound when it is resolved, and a link when it is opened."""
    resolve, inner = os.path.realpath, folder / "inner"

    def replace(path: Path) -> str:
        found = resolve(path)
        if path == inner / "file" and part == "folder":
            inner.rename(folder / "old")
            inner.symlink_to(folder.parent)
            (folder.parent / "file").write_bytes(b"outside")
        elif path == inner / "file":
            (inner / "file").unlink()
            (inner / "file").symlink_to(folder.parent / "secret")
        return found

    monkeypatch.setattr(os.path, "realpath", replace)
    with pytest.raises(OSError, match="inner/file"):
        read_file(folder / "inner" / "file", limit=100, below=folder)


def test_a_size_is_looked_at_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(UnsafeFileError, match=f"{2**40} bytes are over the limit of 10"):
        read_file(path, limit=10)
    path.write_bytes(b"0123456789")
    assert read_file(path, limit=10) == b"0123456789"


@pytest.mark.parametrize("below", [False, True])
def test_missing_files_are_missing(tmp_path: Path, below: bool) -> None:
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("none", "dangling", "none/none"):
        with pytest.raises(FileNotFoundError):
            open_regular(tmp_path / name, below=tmp_path if below else None)


def test_a_refusal_leaves_no_handle_open(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "out").symlink_to("../secret")

    def handles() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = handles()
    for name in ("fifo", "out", "none", "inner", "inner/file/x"):
        with pytest.raises(OSError):
            open_regular(folder / name, below=folder)
    assert handles() == before


def test_appending_creates_a_file_and_follows_no_link(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        with os.fdopen(open_append(path), "a") as file:
            file.write("line\n")
    assert path.read_text() == "line\nline\n"
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "dangling").symlink_to("made")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "dangling", "fifo"):
        with pytest.raises(UnsafeFileError, match="no regular file"):
            open_append(tmp_path / name)
    assert not (tmp_path / "made").exists()


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["inner", "file", "..", ".", "link", "out"]), max_size=6))
def test_no_path_reads_outside(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    home = tmp_path_factory.getbasetemp() / "paths"
    folder = home / "folder"
    if not folder.exists():
        (folder / "inner").mkdir(parents=True)
        for place in (folder, folder / "inner"):
            (place / "file").write_bytes(b"inside")
            (place / "link").symlink_to(folder)
            (place / "out").symlink_to(home)
        (home / "file").write_bytes(b"outside")
    try:
        content = read_file(folder.joinpath(*parts), limit=100, below=folder)
    except OSError:
        return
    assert content == b"inside"
