"""Caches: only folders that nobody else can change are used."""

import os
from pathlib import Path

import pytest

from data.storage.private import is_own, private_folder

OTHER = 12345
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make files of another user")


def test_a_missing_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = private_folder(tmp_path / "new" / "cache", option="data.cache.dir")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o700
    assert private_folder(made, option="data.cache.dir") == made


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(PermissionError, match=r"data.cache.dir: other users can write to .*go-w"):
        private_folder(tmp_path / "cache", option="data.cache.dir")


def test_a_folder_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    outer.chmod(0o777)
    with pytest.raises(PermissionError, match=f"every user can rename what is in {outer}"):
        private_folder(outer / "cache", option="X")
    outer.chmod(0o1777)
    assert private_folder(outer / "cache", option="X")


@as_root
@pytest.mark.parametrize("planted", ["cache", "outer", "link"])
def test_a_folder_of_another_user_is_refused(tmp_path: Path, planted: str) -> None:
    outer, own = tmp_path / "outer", tmp_path / "own"
    for folder in (outer, own):
        folder.mkdir(mode=0o755)
    cache = outer / "cache"
    if planted == "link":
        cache.symlink_to(own)
        os.chown(cache, OTHER, OTHER, follow_symlinks=False)
    else:
        cache.mkdir(mode=0o700)
        os.chown(cache if planted == "cache" else outer, OTHER, OTHER)
    with pytest.raises(PermissionError, match=f"belongs to user {OTHER}"):
        private_folder(cache, option="X")


@as_root
def test_a_folder_of_nobody_is_refused(tmp_path: Path) -> None:
    """Only folders around it may belong to the user that stands for an unmapped root."""
    nobody = 65534
    (tmp_path / "outer" / "cache").mkdir(parents=True)
    os.chown(tmp_path / "outer", nobody, nobody)
    assert private_folder(tmp_path / "outer" / "cache", option="X")
    os.chown(tmp_path / "outer" / "cache", nobody, nobody)
    with pytest.raises(PermissionError, match=f"belongs to user {nobody}"):
        private_folder(tmp_path / "outer" / "cache", option="X")


def test_own_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    assert private_folder(tmp_path / "link", option="X")
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(PermissionError):
        private_folder(tmp_path / "link", option="X")


def test_whose_file_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o600)
    with path.open("rb") as file:
        assert is_own(file.fileno())
        path.chmod(0o620)
        assert not is_own(file.fileno())
        path.chmod(0o600)
        (tmp_path / "hard").hardlink_to(path)
        assert not is_own(file.fileno())
        if os.getuid() == 0:
            (tmp_path / "hard").unlink()
            os.chown(path, OTHER, OTHER)
            assert not is_own(file.fileno())
