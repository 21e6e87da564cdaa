"""Jobs of two ranks that save after every step, killed again and again.

python -m tests.support.kill_ranks FOLDER KILLS SEED OVERRIDES…: each life of the job is forked
from one process that has imported everything; every third kill is of one rank alone. Every second
kill is aimed at a save: both ranks are frozen while the hidden folder of a save is there, and are
killed then. The other kills come a random time after a step that the life itself has committed.
Before each life and at the end it is checked that the newest committed checkpoint opens and that
the life goes on from it. Prints one JSON line; the losses of all lives are in
FOLDER/losses.jsonl.
"""

import functools
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.states import run_state
from trainer.checkpoints.reader import latest_checkpoint, open_checkpoint
from trainer.checkpoints.retention import Retention
from trainer.checkpoints.writer import CheckpointWriter
from trainer.cli import load_config
from trainer.config import Config
from trainer.engine.engines import Engines
from trainer.runs.paths import step_of
from trainer.runtime.ranks import join

RANKS = 2
FOREVER = 10**6
PATIENCE_S = 300.0
"""For a life to begin, to commit or to save; only a life that hangs takes that long."""
LONGEST_LIFE_S = 0.5
"""After its first commit, where a kill is not aimed."""


@dataclass
class Figures:
    """What a campaign did."""

    kills: int = 0
    single_ranks: int = 0
    inside_saves: int = 0
    """Kills aimed at a save, each with a part of a checkpoint on the disk."""
    steps: int = 0
    """Committed in all."""


class Wide(nn.Module):
    """Large enough for a save to take as long as a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 20_000), nn.SiLU(), nn.Linear(20_000, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


def live(folder: Path, config: Config, rank: int, life: int, last: int) -> None:
    """One life of one rank: go on from the newest checkpoint, up to step `last`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # wanted by join, and unused
    rendezvous = f"file://{folder / f'rendezvous{life}'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    ranks = join()
    checkpoint = latest_checkpoint(folder / "checkpoints", ranks)
    step = checkpoint.step if checkpoint else 0
    torch.manual_seed(0)
    engines = Engines({"wide": Wide()}, "wide", config, ranks)
    if checkpoint is not None:
        engines.load(checkpoint)
    writer = CheckpointWriter(folder / "checkpoints", ranks, Retention(keep=2), step, 2**20)
    if ranks.is_main:
        (folder / f"life{life}").write_text(str(step))
    with (folder / "losses.jsonl").open("a", buffering=1) as log:
        while step < last:
            inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(2 * step + rank))
            loss = (engines.averaged.model(inputs) - 1).square().mean()
            engines.averaged.backward(loss)
            result = engines.averaged.step(step)
            step += 1
            if ranks.is_main:
                log.write(json.dumps([step, loss.item(), float(result.grad_norm)]) + "\n")
            averages = engines.averaged.averages
            state = run_state(step, *averages, adam_steps=engines.adam_steps())
            buffers = engines.buffers()
            writer.save(step, engines.tensors(), engines.num_bytes(), buffers, state)
        writer.finish()


def start(folder: Path, config: Config, life: int, last: int) -> Sequence[BaseProcess]:
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=live, args=(folder, config, rank, life, last)) for rank in range(RANKS)
    ]
    for one in ranks:
        one.start()
    return ranks


def newest(folder: Path) -> int:
    """The newest committed step, after a look at every byte of it."""
    paths = sorted((folder / "checkpoints").glob("step_*"))
    return open_checkpoint(paths[-1]).step if paths else 0


def wait_for(ranks: Sequence[BaseProcess], happened: Callable[[], bool], what: str) -> None:
    """Return once it has happened; raises RuntimeError where a rank ended, or hangs, before."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not happened():
        if time.monotonic() > deadline_s or any(one.exitcode is not None for one in ranks):
            kill(ranks, ranks)
            raise RuntimeError(f"{what}: did not happen")
        time.sleep(0.001)


STILL = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


def freeze(ranks: Sequence[BaseProcess]) -> None:
    """Stop the processes, and return when the kernel has stopped every one."""
    for one in ranks:
        psutil.Process(one.pid).suspend()
    for one in ranks:
        while psutil.Process(one.pid).status() not in STILL:
            time.sleep(0.001)


def thaw(ranks: Sequence[BaseProcess]) -> None:
    for one in ranks:
        psutil.Process(one.pid).resume()


def freeze_inside_a_save(folder: Path, ranks: Sequence[BaseProcess]) -> None:
    """Freeze the ranks at a moment when a save has begun and is not committed."""

    def frozen() -> bool:
        if not saving(folder):
            return False
        freeze(ranks)
        if saving(folder):
            return True
        thaw(ranks)  # it was committed in the meantime
        return False

    wait_for(ranks, frozen, "a save that lasts")


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".step_*"))


def committed(folder: Path) -> int:
    """The newest committed step by its name."""
    return max((step_of(path) for path in (folder / "checkpoints").glob("step_*")), default=0)


def kill(ranks: Sequence[BaseProcess], chosen: Sequence[BaseProcess]) -> None:
    """Kill the chosen ones, and what is left of the job as its launcher would."""
    for one in chosen:
        one.kill()
    for one in chosen:
        one.join()
    if len(chosen) < len(ranks):
        thaw([one for one in ranks if one not in chosen and one.exitcode is None])
        time.sleep(0.2)  # the others notice, or not
    for one in ranks:
        one.kill()
        one.join()


def _written(path: Path) -> bool:
    return path.exists() and bool(path.read_text())


def _beyond(folder: Path, step: int) -> bool:
    return committed(folder) > step


def main() -> int:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    # set for load_config, which checks the batch against the ranks
    os.environ["WORLD_SIZE"] = str(RANKS)
    config = load_config(sys.argv[4:])
    draws, figures = random.Random(seed), Figures()
    for life in range(kills):
        before = newest(folder)
        ranks = start(folder, config, life, FOREVER)
        began = folder / f"life{life}"
        started = functools.partial(_written, began)
        wait_for(ranks, started, f"life {life} begins")
        assert int(began.read_text()) == before, (life, before, began.read_text())
        alone, aimed = life % 3 == 2, life % 2 == 0
        if aimed:
            freeze_inside_a_save(folder, ranks)
            figures.inside_saves += saving(folder)
        else:
            went_on = functools.partial(_beyond, folder, before)
            wait_for(ranks, went_on, f"life {life} commits a step")
            time.sleep(draws.uniform(0, LONGEST_LIFE_S))
        kill(ranks, [draws.choice(ranks)] if alone else ranks)
        figures.kills += 1
        figures.single_ranks += alone
    figures.steps = newest(folder)
    for name in ("undisturbed", "checkpoints"):
        target = folder if name == "checkpoints" else folder / name
        target.mkdir(exist_ok=True)
        ranks = start(target, config, kills, figures.steps + 1)
        for one in ranks:
            one.join()
        assert not any(one.exitcode for one in ranks)
        assert newest(target) == figures.steps + 1
    print(json.dumps(asdict(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
