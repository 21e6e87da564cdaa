"""Tars of a source: found by folder, braces and name; compressed ones are refused with a remedy."""

from pathlib import Path

import fsspec
import pytest

from data.sources.tars import list_tars_of
from data.storage.untrusted import UnsafeFileError


def test_tars_are_found_by_folder_braces_and_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/1.tar", "b/0.tar", "c/2.tar", "c/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root = str(tmp_path)
    assert list_tars_of(f"{root}/b") == (f"{root}/b", ["0.tar", "1.tar"])
    assert list_tars_of(f"{root}/b/{{0..1}}.tar") == (f"{root}/b", ["0.tar", "1.tar"])
    assert list_tars_of(f"{root}/c::{root}/b/1.tar") == (root, ["c/2.tar", "b/1.tar"])
    assert list_tars_of(f"file://{root}/b/0.tar") == (f"{root}/b", ["0.tar"])
    assert list_tars_of("s3://bucket/x/{00..01}.tar") == ("s3://bucket/x", ["00.tar", "01.tar"])
    monkeypatch.chdir(tmp_path)
    assert list_tars_of("b") == (f"{root}/b", ["0.tar", "1.tar"])
    for twice in (f"{root}/b::{root}/b/1.tar", f"{root}/b/1.tar::file://{root}/b/1.tar"):
        with pytest.raises(ValueError, match=r"data\.source\.path: .*1\.tar is named 2 times"):
            list_tars_of(twice)
    for refused in ("pipe:touch x", "ssh://host/{0..1}.tar", "local:///x", "simplecache::s3://x"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"data\.source\.path: "):
            list_tars_of(refused)
    for nothing in ("", root):
        with pytest.raises(FileNotFoundError, match=r"data\.source\.path"):
            list_tars_of(nothing)


def test_the_tars_of_a_folder_are_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.tar").touch()
    (folder / "b.tar").symlink_to("a.tar")
    assert list_tars_of(str(folder)) == (str(folder), ["a.tar", "b.tar"])
    (tmp_path / "secret").touch()
    (folder / "c.tar").symlink_to("../secret")
    with pytest.raises(UnsafeFileError, match=r"a link leads out of .*c\.tar"):
        list_tars_of(str(folder))


def test_names_are_no_patterns(tmp_path: Path) -> None:
    for folder in ("set[1]", "set1", "a {x,y} %23#?*é"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder[:4]}.TAR").touch()
        base, names = list_tars_of(str(tmp_path / folder))
        assert (base, names) == (str(tmp_path / folder), [f"{folder[:4]}.TAR"])
    memory, _ = fsspec.core.url_to_fs(f"memory://{tmp_path.name}")
    for number, folder in enumerate(("set[1]", "set1", "set*")):
        memory.pipe_file(f"/{tmp_path.name}/{folder}/{number}.tar", b"")
        base = f"memory:///{tmp_path.name}/{folder}"
        assert list_tars_of(base) == (base, [f"{number}.tar"])


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("0.tar.gz", "gunzip"),
        ("0.TGZ", "gunzip"),
        ("0.tar.zst", "zstd -d --rm"),
        ("0.tar.bz2", "bunzip2"),
        ("0.txz", "unxz"),
        ("0.tar.lz4", "lz4 -d --rm"),
    ],
)
def test_compressed_tars_are_refused_with_the_command_that_unpacks_them(
    tmp_path: Path, name: str, command: str
) -> None:
    for other in ("1.tar", "captions.csv.gz", name):
        (tmp_path / other).touch()
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(
            ValueError, match=rf"data\.source\.path: .*`{command} {tmp_path / name}`"
        ):
            list_tars_of(str(place))


def test_a_folder_of_folders_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds 2 folders"):
        list_tars_of(str(tmp_path))
    (tmp_path / "a.tar" / "0.tar").touch()
    assert list_tars_of(str(tmp_path / "a.tar"))[1] == ["0.tar"]
