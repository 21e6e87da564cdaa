import json
import resource
import signal
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.checkpoint import CheckpointWriter, latest_checkpoint, open_checkpoint
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def tensors(value: float) -> Iterator[tuple[str, str, Tensor]]:
    for name, size in (("a.weight", 6), ("b", 1)):
        for kind in ("weight", "ema"):
            yield kind, name, torch.full((size,), value)


def save(folder: Path, *steps: int, keep: int = 9, ranks: Ranks = ALONE) -> None:
    writer = CheckpointWriter(folder, ranks, keep)
    for step in steps:
        buffers = {"buffer/scale": torch.tensor([2.0])}
        writer.save(step, tensors(float(step)), buffers, {"step": step, "note": "é"})
    writer.wait()


def test_what_is_saved_is_read_back(tmp_path: Path):
    save(tmp_path, 3)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state["note"]) == (3, "é")
    read = found.tensors("weight", "ema", "buffer")
    assert torch.equal(read["weight"]["a.weight"], torch.full((6,), 3.0))
    assert torch.equal(read["ema"]["b"], torch.full((1,), 3.0))
    assert torch.equal(read["buffer"]["scale"], torch.tensor([2.0]))


def test_only_the_newest_stay(tmp_path: Path):
    save(tmp_path, 1, 2, 10, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000010"]


def test_no_manifest_no_checkpoint(tmp_path: Path):
    save(tmp_path, 1, 2)
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choice=st.integers(0, 2**32), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_and_the_one_before_is_taken(
    tmp_path: Path, choice: int, bit: int
):
    if not (tmp_path / "step_00000002").exists():
        save(tmp_path, 1, 2)
    files = sorted((tmp_path / "step_00000002").iterdir())
    ends = list(accumulate(path.stat().st_size for path in files))
    place = choice % ends[-1]
    number = bisect_right(ends, place)
    path = files[number]
    place -= ends[number] - path.stat().st_size
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    original = path.read_bytes()
    path.write_bytes(content)
    found = latest_checkpoint(tmp_path)
    path.write_bytes(original)
    assert found is not None
    # a bit of the manifest's white space may change nothing that is said
    assert found.step == 1 or (path.name == "manifest.json" and json.loads(content))


def test_missing_and_extra_files_are_named(tmp_path: Path):
    save(tmp_path, 1)
    path = tmp_path / "step_00000001"
    (path / "rank_00001.safetensors").touch()
    with pytest.raises(ValueError, match=r"missing or extra \['rank_00001.safetensors'\]"):
        open_checkpoint(path)
    (path / "rank_00001.safetensors").unlink()
    (path / "rank_00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing or extra \['rank_00000.safetensors'\]"):
        open_checkpoint(path)


def test_a_killed_save_is_cleaned_away(tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / ".step_00000002").mkdir()
    (tmp_path / ".step_00000002" / "rank_00000.safetensors").write_bytes(b"half")
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_ranks_share_the_tensors_and_rank_0_waits_for_all(tmp_path: Path):
    writers = [
        CheckpointWriter(tmp_path, Ranks(rank, 1, torch.device("cpu")), 2) for rank in (0, 1)
    ]
    two = [Ranks(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    for writer, ranks in zip(writers, two, strict=True):
        writer._ranks = ranks
        writer.save(5, tensors(5.0), {}, {"step": 5})
    for writer in writers:
        writer.wait()
    path = tmp_path / "step_00000005"
    assert {p.name for p in path.glob("rank_*")} == {
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    }
    read = open_checkpoint(path).tensors("weight", "ema")
    assert {kind: set(names) for kind, names in read.items()} == {
        "weight": {"a.weight", "b"},
        "ema": {"a.weight", "b"},
    }


def test_a_file_that_cannot_grow_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "no checkpoint at step 2" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
