"""Packing goes on after kills, by receipts."""

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from data.config import DataConfig, FilterConfig
from tests.support.packing import folder_config, img2dataset, read_captions, run, webdataset


def whole_set(data: DataConfig) -> dict[str, bytes]:
    files = [file for folder in (data.train, data.val) for file in Path(folder).rglob("*")]
    return {str(file.relative_to(data.dir)): file.read_bytes() for file in files}


def pack_through_kills(data: DataConfig, kills: int, most_files: int) -> int:
    """Pack in processes that are killed, each when it has written some files; then to the end."""
    draws = random.Random(0)
    killed = 0
    for _ in range(kills):
        start_ns, files = time.time_ns(), draws.randint(0, most_files)
        process = multiprocessing.get_context("fork").Process(target=run, args=(data,))
        process.start()
        while process.is_alive() and written_since(data.dir, start_ns) < files:
            time.sleep(0.01)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        for file in Path(data.dir).rglob("[!.]*.tar"):
            with tarfile.open(file) as tar:
                assert len(tar.getnames()) > 0
    run(data)
    return killed


def written_since(folder: str, start_ns: int) -> int:
    """Count the files that appeared, or were replaced, after a moment."""
    count = 0
    for file in Path(folder).rglob("[!.]*"):
        with suppress(FileNotFoundError):
            count += file.is_file() and file.stat().st_mtime_ns > start_ns
    return count


def test_tars_are_registered_through_kills(tmp_path: Path) -> None:
    img2dataset(tmp_path / "raw", tars=40)
    path, rule = str(tmp_path / "raw"), FilterConfig(name="similarity", min=1)
    options = {"val_share": 0.1, "workers": 2}
    undisturbed = webdataset(tmp_path / "a", path, rule, **options)
    run(undisturbed)
    data = webdataset(tmp_path / "b", path, rule, **options)
    assert pack_through_kills(data, kills=5, most_files=16) > 2
    assert whole_set(data) == whole_set(undisturbed)


def test_what_has_a_receipt_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    img2dataset(tmp_path / "raw")
    data = webdataset(tmp_path, str(tmp_path / "raw"), workers=1)
    run(data)
    expected = whole_set(data)
    (Path(data.train) / "manifest.json").unlink()
    (Path(data.train) / "00001.tar.index.npy").write_bytes(b"torn")
    (Path(data.train) / "00002.tar.receipt.json").write_bytes(b'{"identity":')
    read = []
    from data.shards import register

    genuine = register.open_file
    monkeypatch.setattr(
        register,
        "open_file",
        lambda location, **options: (
            read.append(Path(location).name) or genuine(location, **options)
        ),
    )
    run(data)
    assert read == ["00001.tar", "00002.tar"]
    assert whole_set(data) == expected


def test_a_receipt_serves_only_what_it_was_made_for(tmp_path: Path) -> None:
    img2dataset(tmp_path / "raw")
    sets = []
    for number, low in enumerate((1, 2)):
        rule = FilterConfig(name="similarity", min=low)
        sets.append(webdataset(tmp_path / str(number), str(tmp_path / "raw"), rule))
        run(sets[-1])
    data, expected = sets[0], whole_set(sets[1])
    data.filters = sets[1].filters
    (Path(data.train) / "manifest.json").unlink()
    run(data)
    assert whole_set(data) == expected
    for suffix in ("tar", "parquet"):
        shutil.copy(tmp_path / "raw" / f"00002.{suffix}", tmp_path / "raw" / f"00000.{suffix}")
    with (tmp_path / "raw" / "00000.tar").open("ab") as tar:
        tar.write(bytes(10240))
    (Path(data.train) / "manifest.json").unlink()
    run(data)
    assert read_captions(data)[0] == read_captions(data)[10] == "caption 2 2" + " and more" * 2


def test_a_worker_that_dies_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    img2dataset(tmp_path / "raw")
    data = webdataset(tmp_path, str(tmp_path / "raw"), workers=2)
    monkeypatch.setattr("data.shards.register.register_parts", lambda *_, **__: os._exit(1))
    with pytest.raises(ChildProcessError, match=r"^data\.source\.workers: one of 2 processes died"):
        run(data)


def test_a_folder_is_written_through_kills(tmp_path: Path) -> None:
    data = folder_config(tmp_path, samples=120)
    data = dataclasses.replace(data, dir=str(tmp_path / "b"), train=str(tmp_path / "b/train"))
    data.val = str(tmp_path / "b/val")
    undisturbed = dataclasses.replace(
        data, dir=str(tmp_path / "a"), train=str(tmp_path / "a/train")
    )
    undisturbed.val = str(tmp_path / "a/val")
    run(undisturbed)
    Path(data.train).mkdir(parents=True)
    (Path(data.train) / ".000000.tar.k3s9x_aa.part").write_bytes(b"left by a run that was killed")
    assert pack_through_kills(data, kills=5, most_files=20) > 2
    assert whole_set(data) == whole_set(undisturbed)


@pytest.mark.parametrize("kind", ["folder", "tars"])
@pytest.mark.parametrize(
    "moment",
    [
        "refuse_losses",  # after the last shard, before the first manifest
        "print_summary",  # after the manifest of data.train, before that of data.val
    ],
)
def test_a_kill_before_the_account_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, moment: str
) -> None:
    if kind == "tars":
        img2dataset(tmp_path / "raw", tars=3)
        options = {"val_share": 0.3, "workers": 1}
        data = webdataset(tmp_path / "b", str(tmp_path / "raw"), **options)
        undisturbed = webdataset(tmp_path / "a", str(tmp_path / "raw"), **options)
    else:
        made = folder_config(tmp_path)
        (tmp_path / "raw" / "03.txt").unlink()
        data, undisturbed = (
            dataclasses.replace(made, dir=f"{place}", train=f"{place}/train", val=f"{place}/val")
            for place in (tmp_path / "b", tmp_path / "a")
        )
    run(undisturbed)
    with monkeypatch.context() as patch:
        patch.setattr(f"trainer.pack.job.{moment}", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        process = multiprocessing.get_context("fork").Process(target=run, args=(data,))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    done = [(Path(folder) / "manifest.json").exists() for folder in (data.train, data.val)]
    assert done == [moment == "print_summary", False]
    run(data)
    assert whole_set(data) == whole_set(undisturbed)
