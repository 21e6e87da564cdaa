"""The launcher's environment, and collectives on three ranks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.support.paths import ROOT
from trainer.runtime.launcher import world_size
from trainer.runtime.ranks import ALONE, Ranks, choose_device, claim_card
from trainer.runtime.rendezvous import Place

_distributed: Any = dist  # torch exports no type of its stores

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
        "begun": thread.begin_maximum(rank).value(),
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
            "begun": 2.0,
            "gather": ["rank 0", "rank 1", "rank 2"],
            "collect": [] if rank else [0, 1, 2],
            "from_main": ["found", [] if rank else [0, 0]],
            "sum": [1.5, [3, 3], "torch.int64"],
            "thread": ["found", True],
            "parts": parts[rank],
        }


@pytest.mark.parametrize(
    ("local_rank", "count", "device"),
    [(3, 0, "cpu"), (3, 8, "cuda:3"), (3, 1, "cuda:0"), (3, 2, "cuda:1"), (0, 2, "cuda:0")],
)
def test_a_rank_takes_a_gpu_that_it_can_see(local_rank: int, count: int, device: str) -> None:
    place = Place(rank=11, world_size=16, local_rank=local_rank)
    assert choose_device(place, count) == torch.device(device)


def test_ranks_that_share_a_gpu_are_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    store = _distributed.HashStore()
    places = [Place(rank=rank, world_size=3, local_rank=rank) for rank in range(3)]
    claim_card(store, places[0], "GPU-a")
    claim_card(store, places[1], "GPU-b")
    with pytest.raises(ValueError, match=r"^rank 2 on .* LOCAL_RANK=2, shares its GPU .* one task"):
        claim_card(store, places[2], "GPU-a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # all ranks are new, the store is not
    for place, card in zip(places, "abc", strict=True):
        claim_card(store, place, f"GPU-{card}")


def test_a_process_alone_agrees_with_itself() -> None:
    tensors = {"a": torch.tensor(2.0)}
    ALONE.sum_(tensors)
    assert ALONE.from_main(lambda: 5) == ALONE.maximum(5) == ALONE.mean(5) == 5
    assert ALONE.gather(5) == ALONE.collect(5) == [5]
    assert ALONE.for_thread() is ALONE
    assert tensors["a"] == 2.0


def test_a_command_waits_for_the_threads_of_its_collectives_before_it_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.late_collective", "+experiment=emoji"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ended" in done.stdout
