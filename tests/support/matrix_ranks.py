"""Ranks that save at every ZeRO stage and world size, and go on from every save at every other.

python -m tests.support.matrix_ranks FOLDER OVERRIDES…: all jobs at once, forked from a process
that has imported everything. `FOLDER/SOURCE/step_…` are the checkpoints, `FOLDER/SOURCE-TARGET.*`
what came after them; a source that was not stopped is its own target `straight`.
"""

import json
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.states import run_state
from trainer.checkpoints.reader import Checkpoint, latest_checkpoint
from trainer.checkpoints.retention import EVERYTHING
from trainer.checkpoints.writer import CheckpointWriter
from trainer.cli import load_config
from trainer.config import Config
from trainer.engine.engines import Engines
from trainer.runtime.ranks import Ranks, join
from trainer.streams import open_latents

PAIRS = ((0, 1), (1, 2), (2, 2), (3, 2), (1, 4))
"""(ZeRO stage, ranks)."""
SAVED, LAST = 3, 6


def label(stage: int, ranks: int) -> str:
    return f"stage{stage}ranks{ranks}"


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a single number among them, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(512, 7), nn.SiLU(), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.full((3,), 0.25))

    def forward(self, moments: Tensor) -> Tensor:
        return self.body(moments.float().flatten(1)) * self.scale + self.shift


def build(config: Config, ranks: Ranks, checkpoint: Checkpoint | None) -> Engines:
    torch.manual_seed(0)
    engines = Engines({"odd": Odd()}, "odd", config, ranks)
    if checkpoint is not None:
        engines.load(checkpoint)
    return engines


def train(
    engines: Engines, config: Config, ranks: Ranks, first: int, last: int
) -> list[dict[str, Any]]:
    """Steps first … last-1; their losses and sample ids over all ranks, in order."""
    engine, done = engines.averaged, []
    batches = open_latents(config, ranks).steps(first)
    for step in range(first, last):
        ids: list[int] = []
        total = torch.zeros(())
        for batch in next(batches):
            target = torch.from_numpy(batch.index).float()[:, None] / 40
            loss = (engine.model(batch.arrays["moments"]) - target).square().mean()
            engine.backward(loss)
            ids += batch.index.tolist()
            total += loss.detach() * len(batch.index)
        shares = ranks.gather((total.item() / len(ids), ids))
        engine.step(step)
        done.append(
            {
                "loss": sum(loss for loss, _ in shares) / ranks.world_size,
                "ids": [number for _, own in shares for number in own],
            }
        )
    return done


def write(
    folder: Path, name: str, engines: Engines, done: list[dict[str, Any]], ranks: Ranks
) -> None:
    tensors = {f"{kind}/{parameter}": value for kind, parameter, value in engines.tensors()}
    if ranks.is_main:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.st"
        )
        (folder / f"{name}.json").write_text(json.dumps(done))


def job(folder: Path, overrides: list[str], rank: int, world: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # wanted by join, and unused
    rendezvous = f"file://{folder / f'rendezvous{world}'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    ranks = join()
    base = load_config(overrides)
    stages = [stage for stage, count in PAIRS if count == world]
    configs = {
        stage: replace(base, deepspeed=replace(base.deepspeed, stage=stage)) for stage in stages
    }
    for stage, config in configs.items():
        source = label(stage, world)
        engines = build(config, ranks, None)
        train(engines, config, ranks, 0, SAVED)
        writer = CheckpointWriter(folder / source, ranks, EVERYTHING, 0)
        cursor = open_latents(config, ranks).cursor(SAVED)
        averages, adam_steps = engines.averaged.averages, engines.adam_steps()
        state = run_state(SAVED, *averages, cursor=cursor, adam_steps=adam_steps)
        writer.save(SAVED, engines.tensors(), engines.num_bytes(), engines.buffers(), state)
        done = train(engines, config, ranks, SAVED, LAST)
        writer.finish()
        write(folder, f"{source}-straight", engines, done, ranks)
    sources = [label(*pair) for pair in PAIRS]
    while not all((folder / source / f"step_{SAVED:08d}").exists() for source in sources):
        time.sleep(0.05)
    for source in sources:
        for stage, config in configs.items():
            checkpoint = latest_checkpoint(folder / source, ranks)
            assert checkpoint is not None
            checkpoint.training.cursor.check(open_latents(config, ranks).cursor(0))
            engines = build(config, ranks, checkpoint)
            done = train(engines, config, ranks, checkpoint.step, LAST)
            write(folder, f"{source}-{label(stage, world)}", engines, done, ranks)
    dist.barrier()


def main() -> int:
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    worlds = sorted({ranks for _, ranks in PAIRS})
    jobs = [
        fork.Process(target=job, args=(folder, overrides, rank, world))
        for world in worlds
        for rank in range(world)
    ]
    for one in jobs:
        one.start()
    while any(one.is_alive() for one in jobs):
        time.sleep(0.1)
        if any(one.exitcode for one in jobs):
            for other in jobs:
                other.kill()
    return max(abs(one.exitcode or 0) for one in jobs)


if __name__ == "__main__":
    sys.exit(main())
