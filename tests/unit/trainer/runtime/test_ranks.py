"""The launcher's environment, and collectives on three ranks."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from trainer.runtime.launcher import world_size
from trainer.runtime.ranks import ALONE, Ranks

WORLD = 3


def test_a_process_in_a_batch_script_is_not_one_of_the_jobs_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert world_size() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert world_size() == 8


def agree(rank: int, rendezvous: str, found: str) -> None:
    """Every collective once, on one of three ranks; what it gives goes into a file."""
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=WORLD)
    ranks = Ranks(rank, WORLD, torch.device("cpu"))
    asked = []

    def find() -> str:
        asked.append(rank)
        return "found"

    tensors = {"b": torch.full((2,), rank, dtype=torch.int64), "a": torch.tensor(0.5 * rank)}
    ranks.sum_(tensors)
    thread = ranks.for_thread()
    values = {
        "any": [ranks.any(rank == 1), ranks.any(False)],
        "maximum": ranks.maximum(-rank),
        "mean": ranks.mean(rank),
        "gather": ranks.gather(f"rank {rank}"),
        "collect": ranks.collect(rank),
        "from_main": [ranks.from_main(find), asked],
        "sum": [tensors["a"].item(), tensors["b"].tolist(), str(tensors["b"].dtype)],
        "thread": [thread.from_main(find), thread.group is not None],
        "parts": list(ranks.parts(8, 2)),
    }
    ranks.barrier()
    Path(f"{found}.{rank}").write_text(json.dumps(values))
    dist.destroy_process_group()


def test_collectives_give_every_rank_what_they_say(tmp_path: Path) -> None:
    spawn(agree, (str(tmp_path / "rendezvous"), str(tmp_path / "found")), nprocs=WORLD)
    parts = [[[0, 1], [6, 7]], [[2, 3]], [[4, 5]]]
    for rank in range(WORLD):
        assert json.loads((tmp_path / f"found.{rank}").read_text()) == {
            "any": [True, False],
            "maximum": 0.0,
            "mean": 1.0,
            "gather": ["rank 0", "rank 1", "rank 2"],
            "collect": [] if rank else [0, 1, 2],
            "from_main": ["found", [] if rank else [0, 0]],
            "sum": [1.5, [3, 3], "torch.int64"],
            "thread": ["found", True],
            "parts": parts[rank],
        }


def test_a_process_alone_agrees_with_itself() -> None:
    tensors = {"a": torch.tensor(2.0)}
    ALONE.sum_(tensors)
    assert ALONE.from_main(lambda: 5) == ALONE.maximum(5) == ALONE.mean(5) == 5
    assert ALONE.gather(5) == ALONE.collect(5) == [5]
    assert ALONE.for_thread() is ALONE
    assert tensors["a"] == 2.0
