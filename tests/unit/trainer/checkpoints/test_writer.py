import errno
import gc
import math
import os
import random
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from tests.support.states import run_state
from trainer.checkpoints import reader as checkpoint_reader
from trainer.checkpoints import tensors as tensor_files
from trainer.checkpoints import writer as checkpoint_writer
from trainer.checkpoints.reader import (
    Checkpoint,
    latest_checkpoint,
    open_checkpoint,
    open_pinned,
)
from trainer.checkpoints.retention import EVERYTHING, Retention
from trainer.checkpoints.writer import FILE_BYTES, CheckpointWriter
from trainer.config import Best
from trainer.runs import outages as run_outages
from trainer.runtime.ranks import ALONE, Ranks

SIZES = {"a.weight": 6, "b": 1}
NUM_BYTES = 2 * 4 * sum(SIZES.values())


def tensors(value: float) -> Iterator[tuple[str, str, Tensor]]:
    for name, size in SIZES.items():
        for kind in ("weight", "ema.decay_0.9"):
            yield kind, name, torch.full((size,), value)


def save(
    folder: Path,
    *steps: int,
    retention: Retention = EVERYTHING,
    from_step: int | None = None,
    file_bytes: int = FILE_BYTES,
    **state: object,
) -> CheckpointWriter:
    goes_on = max(steps) if from_step is None else from_step
    writer = CheckpointWriter(folder, ALONE, retention, goes_on, file_bytes)
    for step in steps:
        buffers = {"buffer/scale": torch.tensor([2.0]), "buffer/count": torch.tensor(3)}
        about = run_state(step, "decay_0.9", wandb_id="é", **state)
        writer.save(step, tensors(float(step)), NUM_BYTES, buffers, about)
    writer.wait()
    return writer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.training.wandb_id) == (3, "é")
    read = found.tensors("weight", "buffer")
    assert torch.equal(read["weight"]["a.weight"], torch.full((6,), 3.0))
    assert torch.equal(read["buffer"]["scale"], torch.tensor([2.0]))
    assert torch.equal(read["buffer"]["count"], torch.tensor(3))
    assert found.average("")[0] == "decay_0.9"
    assert torch.equal(found.average("decay_0.9")[1]["b"], torch.full((1,), 3.0))
    with found.reading() as read_one:
        assert torch.equal(read_one("weight", "b"), torch.full((1,), 3.0))
    with pytest.raises(ValueError, match=r"^ema\.use=mine: .*step_00000003 has decay_0\.9$"):
        found.average("mine")


def test_only_the_newest_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 10, retention=Retention(keep=2))
    assert names(tmp_path) == ["step_00000002", "step_00000010"]


def test_the_best_by_the_configured_metric_stays(tmp_path: Path) -> None:
    for step, distance in ((1, 9.0), (2, 4.0), (3, 7.0), (4, 8.0)):
        retention = Retention(keep=1, best="eval/fd")
        save(tmp_path, step, retention=retention, metrics={"eval/fd": distance})
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


@given(
    st.dictionaries(
        st.integers(1, 500),
        st.dictionaries(st.just("m"), st.floats(), max_size=1),
        min_size=1,
    ),
    st.integers(1, 5),
    st.integers(0, 9),
    st.sampled_from(Best),
)
def test_what_is_kept(
    measured: dict[int, dict[str, float]], keep: int, keep_every: int, best_is: Best
) -> None:
    kept = Retention(keep, keep_every, "m", best_is).kept(measured)
    newest_first = sorted(measured, reverse=True)
    assert kept >= set(newest_first[:keep])
    assert kept >= {step for step in measured if keep_every and step % keep_every == 0}
    finite = {
        step: values["m"]
        for step, values in measured.items()
        if "m" in values and math.isfinite(values["m"])
    }
    if finite:
        choose = min if best_is is Best.lowest else max
        best = choose(finite.values())
        assert any(finite.get(step) == best for step in kept)
    assert len(kept) <= keep + bool(finite) + len(
        [step for step in measured if keep_every and step % keep_every == 0]
    )


def test_a_share_is_cut_into_files_of_the_same_tensors(tmp_path: Path) -> None:
    save(tmp_path / "one", 1)
    save(tmp_path / "cut", 1, file_bytes=30)
    assert names(tmp_path / "cut" / "step_00000001") == [
        "manifest.json",
        *(f"rank_00000_{number:03d}.safetensors" for number in range(3)),
        "state.json",
    ]
    read = [
        open_checkpoint(tmp_path / folder / "step_00000001").tensors("weight", "ema.decay_0.9")
        for folder in ("one", "cut")
    ]
    assert read[0].keys() == read[1].keys()
    for kind, parameters in read[0].items():
        for name, tensor in parameters.items():
            assert torch.equal(tensor, read[1][kind][name])


def test_where_copies_do_not_fit_training_waits_and_one_file_is_held_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "free_host_memory_bytes", lambda: 2 * NUM_BYTES - 1)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def counted() -> Iterator[tuple[str, str, Tensor]]:
        nonlocal most
        for kind, name, tensor in tensors(1.0):
            alive.append(weakref.ref(tensor))
            yield kind, name, tensor
            del tensor
            gc.collect()
            most = max(most, sum(tensor() is not None for tensor in alive))

    writer = CheckpointWriter(tmp_path, ALONE, EVERYTHING, 0, file_bytes=24)
    writer.save(1, counted(), NUM_BYTES, {}, run_state(1))
    assert names(tmp_path) == ["step_00000001"]
    assert "training waits while this checkpoint is written" in capsys.readouterr().out
    assert most <= 2
    monkeypatch.setattr(checkpoint_writer, "free_host_memory_bytes", lambda: 2 * NUM_BYTES)
    writer.save(2, tensors(2.0), NUM_BYTES, {}, run_state(2))
    writer.finish()
    assert capsys.readouterr().out == ""


def test_no_manifest_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_200_flipped_bits_over_all_files_are_found_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2, file_bytes=30)
    files = sorted((tmp_path / "step_00000002").iterdir())
    assert len(files) == 5
    draws = random.Random(0)
    for number in range(200):
        path = files[number % len(files)]
        original = path.read_bytes()
        content = bytearray(original)
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        path.write_bytes(content)
        found = latest_checkpoint(tmp_path)
        path.write_bytes(original)
        assert found is not None
        assert found.step == 1
        assert f"warning: {path}" in capsys.readouterr().err or path.name == "manifest.json"
    assert latest_checkpoint(tmp_path) == open_checkpoint(tmp_path / "step_00000002")


def test_missing_and_extra_files_are_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step_00000001"
    (path / "rank_00001_000.safetensors").touch()
    with pytest.raises(ValueError, match=r"missing or extra \['rank_00001_000.safetensors'\]"):
        open_checkpoint(path)
    (path / "rank_00001_000.safetensors").unlink()
    (path / "rank_00000_000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing or extra \['rank_00000_000.safetensors'\]"):
        open_checkpoint(path)


def test_what_lies_beyond_the_step_gone_on_from_is_set_aside_until_it_is_passed(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1, 2, 3)
    for step in (2, 3):
        (tmp_path / f"step_{step:08d}" / "state.json").write_text("{}")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    save(tmp_path, 2, retention=Retention(keep=2), from_step=found.step)
    # the damaged ones must not push out the good one, as newer they would
    assert names(tmp_path) == ["damaged_step_00000003", "step_00000001", "step_00000002"]
    save(tmp_path, 3, retention=Retention(keep=2), from_step=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_a_killed_save_is_cleaned_away(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step_00000002").mkdir()
    (tmp_path / ".step_00000002" / "rank_00000_000.safetensors").write_bytes(b"half")
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_links_and_foreign_names_do_not_fail_a_save(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    save(folder, 1, 2)
    (folder / "step_00000001").rename(elsewhere)
    (folder / "step_00000001").symlink_to(elsewhere)
    (folder / "step_00000004").symlink_to(tmp_path / "nowhere")
    (folder / "step_00000005").touch()
    (folder / ".step_00000003").touch()
    (folder / "step_00000009").symlink_to(folder)
    foreign = ["._step_00000002", "step_00000002_backup", "step_2", "notes"]
    for name in foreign:
        (folder / name).touch()
    assert latest_checkpoint(folder, up_to=2) is not None
    save(folder, 3, 4, 5, 9, from_step=2, retention=Retention(keep=2)).finish()
    assert names(folder) == sorted([*foreign, "step_00000005", "step_00000009"])
    assert not (folder / "step_00000009").is_symlink()
    assert names(elsewhere) == names(folder / "step_00000009")  # its bytes stay


def test_an_old_checkpoint_that_stays_does_not_fail_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def remove(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint_writer, "remove", remove)
    save(tmp_path, 1, 2, retention=Retention(keep=1)).finish()
    assert names(tmp_path) == [".step_00000001", "step_00000002"]
    assert "step 2 is saved, but an old checkpoint stays" in capsys.readouterr().err


def test_a_save_is_tried_again_from_memory_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts, real = [], tensor_files.save_file

    def save_file(values: dict[str, Tensor], path: Path) -> None:
        attempts.append(path)
        if len(attempts) < 4:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(values, path)

    monkeypatch.setattr(tensor_files, "save_file", save_file)
    monkeypatch.setattr(run_outages, "FIRST_RETRY_S", 0.005)
    events: list[str] = []
    outages = run_outages.Outages(lambda event, **details: events.append(event))
    writer = CheckpointWriter(tmp_path, ALONE, EVERYTHING, 0, outages=outages)
    weights = {"b": torch.ones(3)}
    writer.save(
        1, (("weight", name, own.clone()) for name, own in weights.items()), 12, {}, run_state(1)
    )
    weights["b"].zero_()  # the next step changes the weights
    writer.finish(20.0)
    assert not writer.failed
    found = open_checkpoint(tmp_path / "step_00000001")
    assert torch.equal(found.tensors("weight")["weight"]["b"], torch.ones(3))
    (event,) = events
    assert event.startswith(f"{tmp_path} is written, after 3 failed attempts")


FULL_DISK = """
import subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=True)
import torch
from trainer.checkpoints.reader import latest_checkpoint
from trainer.checkpoints.writer import CheckpointWriter
from trainer.runtime.ranks import ALONE, Ranks
from trainer.checkpoints.retention import Retention
from tests.support.states import run_state
def save(step):
    tensors = (("weight", str(n), torch.full((2**18,), float(step))) for n in range(2))
    writer.save(step, tensors, 2**21, {}, run_state(step))
writer = CheckpointWriter(folder, ALONE, Retention(keep=1), 0, file_bytes=2**20)
save(1)
writer.finish()
save(2)
writer.wait()
assert writer.failed
assert [path.name for path in folder.iterdir()] == ["step_00000001"]
assert latest_checkpoint(folder).step == 1
try:
    writer.finish()
    raise SystemExit("a last save that failed must be an error")
except OSError as error:
    print(error)
subprocess.run(["mount", "-o", "remount,size=9m", folder], check=True)
save(3)
writer.finish()
assert [path.name for path in folder.iterdir()] == ["step_00000003"]
"""


def test_a_full_disk_loses_nothing_and_the_next_save_may_succeed(tmp_path: Path) -> None:
    run = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    warning, again = run.stderr.splitlines()  # though there were several attempts
    assert again.startswith(f"{tmp_path} is written, after ")
    assert warning.startswith(f"warning: {tmp_path} cannot be written: ")
    assert "No space left" in warning
    assert "bytes free; no checkpoint at step 2 so far, the one before is intact" in warning
    assert "make room and start again" in run.stdout


def test_a_checkpoint_that_is_read_stays_until_its_reader_is_done(tmp_path: Path) -> None:
    save(tmp_path, 1)
    reader = latest_checkpoint(tmp_path, pinned=True)
    save(tmp_path, 2, 3, retention=Retention(keep=1), from_step=1)
    assert names(tmp_path) == [".pins", "step_00000001", "step_00000003"]
    assert reader is not None
    assert torch.equal(reader.tensors("weight")["weight"]["b"], torch.full((1,), 1.0))
    del reader
    save(tmp_path, 4, retention=Retention(keep=1), from_step=3)
    assert names(tmp_path) == [".pins", "step_00000004"]


def test_the_pin_of_a_killed_reader_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    pinned = tmp_path / ".pins" / "step_00000001.0.json"
    pinned.parent.mkdir()
    pinned.write_bytes(b"")
    os.utime(pinned, (0, 0))
    save(tmp_path, 2, retention=Retention(keep=1), from_step=1)
    assert names(tmp_path) == [".pins", "step_00000002"]
    assert names(pinned.parent) == []


def test_a_reader_takes_the_next_checkpoint_where_the_newest_is_removed_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    opened: list[Path] = []

    def open_late(path: Path, ranks: Ranks = ALONE) -> Checkpoint:
        if not opened:  # retention had looked for pins before this one was set
            shutil.rmtree(path)
            save(tmp_path, 2, from_step=1)
        opened.append(path)
        return open_checkpoint(path, ranks)

    monkeypatch.setattr(checkpoint_reader, "open_checkpoint", open_late)
    found = latest_checkpoint(tmp_path, pinned=True)
    assert found is not None
    assert found.step == 2
    assert capsys.readouterr() == ("", "")


def test_a_checkpoint_in_a_folder_that_is_no_checkpoint_gets_no_pin(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint"):
        open_pinned(tmp_path / "typo" / "step_00000001")
    assert names(tmp_path) == []
