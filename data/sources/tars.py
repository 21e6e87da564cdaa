"""Find the tars of a source, by folder, by braces and by name."""

import os
from collections import Counter
from itertools import takewhile
from pathlib import Path, PurePosixPath

from webdataset.shardlists import expand_urls

from data.shards.tar import UNPACK
from data.storage.files import list_folder, local_path
from data.storage.untrusted import open_regular
from data.text import printable

UNPACK_SUFFIX = {
    ".gz": "gzip",
    ".tgz": "gzip",
    ".zst": "zstd",
    ".tzst": "zstd",
    ".bz2": "bzip2",
    ".tbz": "bzip2",
    ".tbz2": "bzip2",
    ".xz": "xz",
    ".txz": "xz",
    ".lz4": "lz4",
}
"""Suffix of a compressed tar → the program that made it."""


def list_tars_of(pattern: str) -> tuple[str, list[str]]:
    """Return the common folder (path or URL) of a source's tars, and their names relative to it.

    pattern: folders of tars, and tars with braces (`{0000..0123}.tar`), joined by `::`. A local
    path that is there is taken as it stands, with any braces in its name.
    Raises: FileNotFoundError where the pattern is empty or a folder holds no tar; ValueError where
    a URL's scheme is not allowed, a tar is named twice, or tars are compressed.
    """
    if not pattern:
        raise FileNotFoundError("data.source.path: name the folder or the tars to use")
    tars: list[str] = []
    try:
        places = [pattern] if Path(pattern).exists() else expand_urls(pattern)
        for location in places:
            tars += _tars_at(location)
        paths = [local_path(tar) for tar in tars]
    except ValueError as error:
        raise ValueError(f"data.source.path: {error}") from error
    tars = [
        tar if path is None else path.absolute().as_posix()
        for tar, path in zip(tars, paths, strict=True)
    ]
    for tar, number in Counter(tars).items():
        if number > 1:
            raise ValueError(f"data.source.path: {tar} is named {number} times")
    folders = [tar.split("/")[:-1] for tar in tars]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*folders, strict=False))
    base = "/".join(column[0] for column in shared)
    return base, [tar[len(base) + 1 :] for tar in tars]


def _tars_at(location: str) -> list[str]:
    """Return a tar, or those directly in a folder; their names may end in capitals."""
    path = local_path(location)
    is_folder = path is not None and path.is_dir()
    if _is_compressed_tar(location):
        _refuse_compressed([location])
    if _is_tar(location) and not is_folder:
        return [location]
    found = list_folder(location)
    _refuse_compressed([one for one in found if _is_compressed_tar(one)])
    tars = [one for one in found if _is_tar(one)]
    if path is not None:
        for tar in tars:
            os.close(open_regular(Path(tar), below=path))
    if not tars:
        inner = sum(one.endswith("/") for one in found)
        hint = f"; it holds {inner} folders, and those of tars are named, joined by `::`"
        where = f"data.source.path: no .tar files in {location!r}"
        raise FileNotFoundError(where + hint if inner else where)
    return tars


def _is_tar(location: str) -> bool:
    return location.lower().endswith(".tar")


def _is_compressed_tar(location: str) -> bool:
    suffixes = PurePosixPath(location.lower()).suffixes[-2:]
    joined = suffixes[:1] == [".tar"] or suffixes[-1:] not in ([".gz"], [".bz2"], [".xz"], [".lz4"])
    return bool(suffixes) and suffixes[-1] in UNPACK_SUFFIX and joined


def _refuse_compressed(found: list[str]) -> None:
    if found:
        program = UNPACK_SUFFIX[PurePosixPath(found[0].lower()).suffix]
        more = f" and {len(found) - 1} more are" if len(found) > 1 else " is"
        raise ValueError(
            f"{printable(found[0])}{more} compressed with {program}, and samples are read by "
            f"position: unpack them once, `{UNPACK[program]} {printable(found[0])}`"
        )
