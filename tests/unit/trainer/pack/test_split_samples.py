"""Samples whose members end one tar and begin the next one are told, and nothing else is."""

import io
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from data.shards.manifest import Manifest
from tests.support.data_sets import png
from tests.support.packing import read_captions, run, webdataset

HALF = "samples that are split between two tars"


@pytest.mark.parametrize(
    ("first", "second", "lost", "packed"),
    [
        (["0.png", "0.txt", "1.png"], ["1.txt", "2.png", "2.txt"], 2, ["0", "2"]),
        (["0.png", "0.txt", "1.txt"], ["1.png", "2.png", "2.txt"], 2, ["0", "2"]),
        (["0.png", "0.txt"], ["0.json", "2.png", "2.txt"], 1, ["0", "2"]),
    ],
)
def test_samples_that_are_split_between_tars_are_told_and_can_be_joined(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: list[str],
    second: list[str],
    lost: int,
    packed: list[str],
) -> None:
    write_tars(tmp_path / "raw", [first, second])
    data = webdataset(tmp_path, str(tmp_path / "raw"))
    run(data)
    manifest = Manifest.load(data.train, option="data.train")
    assert (read_captions(data), sum(manifest.rejected.values())) == (packed, lost)
    (entry,) = [one for one in manifest.left_out if HALF in one.reason]
    assert (entry.count, entry.examples) == (1, [second[0].partition(".")[0]])
    printed = capsys.readouterr().out
    assert HALF in printed
    (command,) = re.findall(r"`(tar --concatenate .*?)`", printed)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path / "raw")
    (tmp_path / "raw" / "1.tar").unlink()
    again = webdataset(tmp_path / "again", str(tmp_path / "raw"))
    run(again)
    whole = sorted({name.partition(".")[0] for name in (*first, *second)})
    assert read_captions(again) == whole
    assert Manifest.load(again.train, option="data.train").left_out == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["0.png", "0.txt"], ["0.png", "0.txt"]),  # keys that begin anew in each tar
        (["0.png", "0.txt", "1.png"], ["0.png", "0.txt", "1.txt"]),
        ([], ["0.txt"]),
        (["0.png"], ["1.txt"]),
    ],
)
def test_samples_of_one_key_may_be_two_samples(
    tmp_path: Path, first: list[str], second: list[str]
) -> None:
    write_tars(tmp_path / "raw", [first, second, ["9.png", "9.txt"]])
    data = webdataset(tmp_path, str(tmp_path / "raw"))
    run(data)
    left_out = Manifest.load(data.train, option="data.train").left_out
    assert not [one for one in left_out if HALF in one.reason]


def write_tars(folder: Path, tars: list[list[str]]) -> None:
    """Write tars of members; a text is the key of its sample."""
    folder.mkdir()
    for number, names in enumerate(tars):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name in names:
                key, _, extension = name.partition(".")
                payload = {"png": png(int(key)), "txt": key.encode(), "json": b"{}"}[extension]
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
