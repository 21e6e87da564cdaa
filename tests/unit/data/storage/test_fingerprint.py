"""A fingerprint tells a file that was written again, whatever its size and time say."""

import os
from pathlib import Path

import fsspec
import pytest

from data.storage import fingerprint as module
from data.storage.fingerprint import fingerprint


def test_a_local_file_written_again_under_the_same_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(bytes(2**20))
    times = path.stat()
    before = fingerprint(str(path))
    assert fingerprint(str(path)) == fingerprint(f"file://{path}") == before
    with path.open("r+b") as file:  # at a place between the samples
        file.seek(2**19 + 50_000)
        file.write(b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(str(path)) != before


def test_samples_tell_what_times_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems keep times in whole seconds, or none at all."""
    path = tmp_path / "0.tar"
    path.write_bytes(bytes(2**20))
    facts = path.stat()
    found = set()
    for place in (0, 2**20 - 1):
        content = bytearray(2**20)
        content[place] = 1
        path.write_bytes(content)
        monkeypatch.setattr(module.os, "fstat", lambda handle: facts)
        found.add(fingerprint(str(path)))
    assert len(found) == 2


@pytest.mark.parametrize("facts", [{"ETag": "x"}, {"created": "now"}, {}])
def test_a_remote_file_by_what_its_store_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str]
) -> None:
    location = f"memory://{tmp_path.name}/0.tar"
    store, path = fsspec.core.url_to_fs(location)
    stated: dict[str, object] = {**facts, "size": 5}
    monkeypatch.setattr(type(store), "info", lambda *_, **__: stated)
    store.pipe_file(path, b"12345")
    before = fingerprint(location)
    assert fingerprint(location) == before
    store.pipe_file(path, b"54321")
    assert (fingerprint(location) != before) == (not facts)
    stated.update({name: f"{value} later" for name, value in facts.items()})
    assert fingerprint(location) != before


def test_a_missing_file(tmp_path: Path) -> None:
    for location in (str(tmp_path / "none"), f"memory://{tmp_path.name}/none"):
        with pytest.raises(FileNotFoundError):
            fingerprint(location)
