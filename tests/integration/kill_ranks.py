"""Jobs of two ranks that save after every step, killed again and again at random moments.

python -m tests.integration.kill_ranks FOLDER KILLS SEED OVERRIDES…: each life of the job is forked
from one process that has imported everything; every third kill is of one rank alone. Before each
life and at the end it is checked that the newest committed checkpoint opens and that the life goes
on from it. Prints one JSON line; the losses of all lives are in FOLDER/losses.jsonl.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint import latest_checkpoint, open_checkpoint
from trainer.checkpoint_writer import CheckpointWriter
from trainer.cli import load_config
from trainer.config import Config
from trainer.distributed import join
from trainer.engines import Engines
from trainer.retention import Retention

RANKS = 2
FOREVER = 10**6
FIRST_SAVE_S = 60.0
LONGEST_LIFE_S = 1.0
"""After the first save; a life that is never killed is one that ends by itself."""


@dataclass
class Figures:
    """What a campaign did."""

    kills: int = 0
    single_ranks: int = 0
    inside_saves: int = 0
    """Kills that left a part of a checkpoint behind."""
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
    engines = Engines({"wide": Wide()}, config, ranks)
    if checkpoint is not None:
        engines.load(checkpoint)
    writer = CheckpointWriter(folder / "checkpoints", ranks, Retention(keep=2), step, 2**20)
    if ranks.is_main:
        (folder / f"life{life}").write_text(str(step))
    with (folder / "losses.jsonl").open("a", buffering=1) as log:
        while step < last:
            inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(2 * step + rank))
            loss = (engines.first.model(inputs) - 1).square().mean()
            engines.first.backward(loss)
            result = engines.first.step(step)
            step += 1
            if ranks.is_main:
                log.write(json.dumps([step, loss.item(), result.grad_norm]) + "\n")
            state = {"step": step, **engines.state()}
            buffers = engines.buffers()
            writer.save(step, engines.tensors(), engines.num_bytes(), buffers, state)
        writer.finish()


def start(folder: Path, config: Config, life: int, last: int) -> list:
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


def kill(ranks: list, chosen: list) -> None:
    """Kill the chosen ones, and what is left of the job as its launcher would."""
    for one in chosen:
        os.kill(one.pid, signal.SIGKILL)
    for one in chosen:
        one.join()
    time.sleep(0.2 if len(chosen) < len(ranks) else 0)
    for one in ranks:
        one.kill()
        one.join()


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
        deadline_s = time.monotonic() + FIRST_SAVE_S
        while not (began.exists() and began.read_text()):
            if time.monotonic() > deadline_s or any(one.exitcode for one in ranks):
                kill(ranks, ranks)
                raise RuntimeError(f"life {life} did not begin")
            time.sleep(0.01)
        assert int(began.read_text()) == before, (life, before, began.read_text())
        time.sleep(draws.uniform(0, LONGEST_LIFE_S))
        alone = life % 3 == 2
        kill(ranks, [draws.choice(ranks)] if alone else ranks)
        figures.kills += 1
        figures.single_ranks += alone
        figures.inside_saves += any((folder / "checkpoints").glob(".step_*"))
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
