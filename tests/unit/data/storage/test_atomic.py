"""Files and folders that are whole or absent, whatever ends their writer."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage.atomic import (
    append_lines,
    atomic_folder,
    atomic_path,
    remove,
    remove_leftovers,
    replace_folder,
    write_atomic,
)

Event = tuple[str, str]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@given(st.lists(st.binary(max_size=5000), min_size=1, max_size=4), st.text("aß[*]. ", min_size=1))
def test_the_last_write_stays_alone(payloads: list[bytes], ending: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "new", f"file{ending}")
        for payload in payloads:
            write_atomic(path, payload)
            assert path.read_bytes() == payload
        assert names(path.parent) == [path.name]


@pytest.mark.parametrize("mask", [0o002, 0o027, 0o077])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", b"1")
        with atomic_path(tmp_path / "replaced") as part:
            replace_privately(part)
        with atomic_folder(tmp_path / "folder") as part:
            (part / "inside").touch()
            replace_privately(part / "inside")
    finally:
        os.umask(before)
    for name in ("file", "replaced", "folder/inside"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def replace_privately(path: Path) -> None:
    """Write a file like safetensors: by a private file, which is renamed."""
    other = path.with_name("other")
    other.touch(0o600)
    other.replace(path)


@pytest.mark.parametrize("kind", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_middle_keeps_the_old_content(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    write_atomic(tmp_path / "file", b"old")
    with atomic_folder(tmp_path / "folder") as part:
        (part / "file").write_bytes(b"old")
    with pytest.raises(kind), atomic_path(tmp_path / "file") as part:
        part.write_bytes(b"ne")
        raise kind
    with pytest.raises(kind), atomic_folder(tmp_path / "folder") as part:
        (part / "other").write_bytes(b"ne")
        raise kind
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder" / "file").read_bytes() == b"old"
    assert names(tmp_path / "folder") == ["file"]


def test_a_full_disk_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "file", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "file", b"new")
    with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "folder") as part:
        (part / "file").write_bytes(b"new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("door", ["atomic_path", "atomic_folder"])
def test_a_killed_writer_leaves_the_old_content_and_what_can_be_removed(
    tmp_path: Path, door: str
) -> None:
    """The next write needs no cleaning, and cleaning touches nothing else."""
    path = tmp_path / "n[1].json"
    other = tmp_path / ".n1.json.0123.part"
    other.write_bytes(b"another file's")
    with atomic_path(path) if door == "atomic_path" else atomic_folder(path) as part:
        (part / "file" if part.is_dir() else part).write_bytes(b"old")
    script = (
        "import sys\nfrom pathlib import Path\nfrom data.storage import atomic\n"
        f"with atomic.{door}(Path(sys.argv[1])) as part:\n"
        "    (part / 'file' if part.is_dir() else part).write_bytes(b'ne')\n"
        "    print('half', flush=True)\n    sys.stdin.read()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        writer.send_signal(signal.SIGKILL)
    file = path / "file" if path.is_dir() else path
    assert file.read_bytes() == b"old"
    assert len(names(tmp_path)) == 3
    with atomic_path(path) if door == "atomic_path" else atomic_folder(path) as part:
        (part / "file" if part.is_dir() else part).write_bytes(b"new")
    remove_leftovers(path)
    assert names(tmp_path) == [other.name, path.name]
    assert file.read_bytes() == b"new"


def test_writers_at_the_same_time_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(number: int) -> bytes:
        write_atomic(path, bytes([number]) * 100_000)
        return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(write, range(100)))
    assert all(len(content) == 100_000 and len(set(content)) == 1 for content in seen)
    assert names(tmp_path) == ["file"]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Event]]:
    """What reaches the disk and what is renamed, in order; by the name it has then."""
    seen: list[Event] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def note(handle: int) -> None:
        seen.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def note_rename(source: Path, target: Path) -> Path:
        seen.append(("rename", target.name))
        return rename(source, target)

    def note_replace(source: Path, target: Path) -> Path:
        seen.append(("rename", target.name))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(Path, "replace", note_replace)
    yield seen


def test_bytes_reach_the_disk_before_their_name_and_the_name_before_the_end(
    tmp_path: Path, events: list[Event]
) -> None:
    write_atomic(tmp_path / "file", b"1")
    (first, part), *rest = events
    assert first == "sync"
    assert part.startswith(".file.")
    assert rest == [("rename", "file"), ("sync", tmp_path.name)]


def test_a_folder_is_on_the_disk_whole_before_it_has_its_name(
    tmp_path: Path, events: list[Event]
) -> None:
    with atomic_folder(tmp_path / "folder") as part:
        (part / "a").mkdir()
        for name in ("a/x", "a/y", "b"):
            (part / name).write_bytes(b"1")
    renamed = events.index(("rename", "folder"))
    assert sorted(events[:renamed]) == sorted(
        ("sync", name) for name in ("x", "y", "a", "b", part.name)
    )
    assert events[renamed + 1 :] == [("sync", tmp_path.name)]


def test_a_folder_is_replaced_even_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    for name in ("new", "now", ".old_now"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "now")
    assert names(tmp_path) == ["now"]
    assert (tmp_path / "now" / "file").read_text() == "new"


def test_an_error_names_the_file(tmp_path: Path) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    for write in (lambda: write_atomic(path, b"1"), lambda: append_lines(path, ["1"])):
        with patch("os.fsync", full), pytest.raises(OSError, match=f"No space .*'{path}'"):
            write()


def test_a_link_is_replaced_and_removed_without_its_target(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    for target in ("elsewhere", "nowhere"):
        remove(tmp_path / "now")
        (tmp_path / "now").symlink_to(tmp_path / target)
        (tmp_path / "new").mkdir()
        replace_folder(tmp_path / "new", tmp_path / "now")
        assert not (tmp_path / "now").is_symlink()
        (tmp_path / "link").symlink_to(tmp_path / target)
        remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert names(tmp_path) == ["elsewhere", "now"]
    assert names(tmp_path / "elsewhere") == ["file"]


FAULTS = st.sampled_from(["short", "no space", "late"])


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.text("ab\u20ac", max_size=9), min_size=1, max_size=4), max_size=6),
    st.lists(st.none() | FAULTS, max_size=30),
    st.sampled_from(["", "whole\n", "to"]),
)
def test_lines_are_appended_once_past_any_failure(
    batches: list[list[str]], plan: list[str | None], before: str
) -> None:
    faults, real_write, real_sync = iter(plan), os.write, os.fsync
    late = False

    def write(handle: int, payload: bytes) -> int:
        nonlocal late
        fault = next(faults, None)
        late = fault == "late"
        if fault == "no space":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(handle, payload[: len(payload) // 2] if fault == "short" else payload)

    def sync(handle: int) -> None:
        if late:  # a disk behind a network says only now that it is full
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real_sync(handle)

    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "lines")
        path.write_text(before)
        with patch("os.write", write), patch("os.fsync", sync):
            for batch in batches:
                for _ in range(len(plan) + 1):
                    try:
                        append_lines(path, batch)
                        break
                    except OSError:
                        assert path.read_text().startswith(before)
        ended = f"{before}\n" if batches and before == "to" else before
        assert path.read_text() == ended + "".join(f"{line}\n" for b in batches for line in b)
