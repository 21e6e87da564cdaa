"""Checks of every rank before the first step."""

import hashlib
import json
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.streams.stream import Batch
from trainer.checkpoints.retention import Retention
from trainer.config import Config
from trainer.engine.engines import Engines
from trainer.runs.paths import CHECKPOINTS, checkpoints_in
from trainer.runs.record import plain_config, versions
from trainer.runtime.devices import peak_flops_per_s
from trainer.runtime.flops import FlopCounter
from trainer.runtime.ranks import Ranks, end_together
from trainer.train.feed import Feed
from trainer.train.snapshots import snapshots_bytes
from trainer.train.task import TrainingTask, Turn

_torch: Any = torch  # torch declares no types for some of its functions

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """One rank's host, device, environment and problem."""

    host: str
    device: str
    """Name of the device."""
    device_id: str
    """Identifier among the host's devices; empty for a CPU."""
    versions: dict[str, str]
    config: str
    """Hash of the config."""
    problem: str
    """A problem of this rank in words; empty without one."""


def preflight(
    config: Config,
    ranks: Ranks,
    task: TrainingTask,
    engines: Engines,
    steps: tuple[int, int],
) -> float:
    """Check ranks, versions, disk and shards, and rehearse one micro batch; collective.

    steps: the first and the last data step of this training.
    Returns the FLOPs of a sample's forward and backward pass, 0 if the device's peak is unknown.
    Weights, Adam's moments, buffers, generators and the order of the data do not change.
    Raises: SystemExit after one line that names the problem; ValueError if this rank has too little
    memory.
    """
    start_s = time.perf_counter()
    checkpoint_bytes = engines.num_bytes()
    problem = _data_problem(task, steps)
    if ranks.is_main:
        problem = problem or _disk_problem(config, engines)
    # rank 0 alone compares: with all facts on all ranks, traffic would grow with their square
    facts = ranks.collect(_rank_facts(config, ranks, problem))
    problems = ranks.from_main(lambda: list(disagreements(facts)))
    if problems:
        end_together(ranks, f"preflight: {'; '.join(problems)}")
    rehearsal = Rehearsal(config, ranks, task, engines, steps)
    flops = rehearsal.run()
    slowest_s = ranks.maximum(time.perf_counter() - start_s)
    if ranks.is_main:
        devices = Counter(one.device for one in facts)
        named = ", ".join(f"{count} x {device}" for device, count in devices.items())
        free_bytes = shutil.disk_usage(config.run.dir).free
        print(
            f"preflight: {len(facts)} rank(s) on {len({one.host for one in facts})} host(s) "
            f"({named}), versions alike, shards open, {checkpoint_bytes / GIB:.2f} GiB a "
            f"checkpoint and {free_bytes / GIB:.0f} GiB free, a trial batch of "
            f"{config.train.micro_batch_size} fits{rehearsal.peak()}; {slowest_s:.1f} s",
            flush=True,
        )
    return flops


def disagreements(facts: Sequence[RankFacts]) -> Iterator[str]:
    """Yield the problems of single ranks and their differences from rank 0, naming the ranks."""
    main = facts[0]
    rank_of_device: dict[tuple[str, str], int] = {}
    for rank, own in enumerate(facts):
        who = f"rank {rank} on {own.host}"
        if own.problem:
            yield f"{who}: {own.problem}"
        if own.device != main.device:
            yield (
                f"{who} has {own.device}, but rank 0 on {main.host} has {main.device}: ask "
                "for nodes of one kind in slurm/cluster.env"
            )
        differing = [
            f"{name} {own.versions.get(name)} and not {version}"
            for name, version in main.versions.items()
            if own.versions.get(name) != version
        ]
        if differing:
            yield f"{who} has {', '.join(differing)}: give all nodes the same environment"
        if own.config != main.config:
            yield f"{who} has another config than rank 0: start all ranks with one command"
        if own.device_id:
            other = rank_of_device.setdefault((own.host, own.device_id), rank)
            if other != rank:
                yield f"{who} shares its GPU with rank {other}: start one task a GPU"


def _rank_facts(config: Config, ranks: Ranks, problem: str) -> RankFacts:
    cuda = ranks.device.type == "cuda"
    text = json.dumps(plain_config(config), sort_keys=True)
    return RankFacts(
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(ranks.device) if cuda else "CPU",
        device_id=str(_torch.cuda.get_device_properties(ranks.device).uuid) if cuda else "",
        versions=versions(),
        config=hashlib.sha256(text.encode()).hexdigest(),
        problem=problem,
    )


def _disk_problem(config: Config, engines: Engines) -> str:
    """Return a line if not even one checkpoint fits on the disk; else ''.

    Prints a warning if the checkpoints that will stay and one more, or the snapshots, do not fit.
    """
    folder, one = Path(config.run.dir), engines.num_bytes()
    free = shutil.disk_usage(folder).free
    if one > free:
        return (
            f"{folder} has {free:,} bytes free, but a checkpoint needs {one:,}: free space, or "
            "choose another run.dir"
        )
    options = config.checkpoint
    count = Retention.of(options).largest(options.every, config.train.max_steps)
    present = checkpoints_in(folder / CHECKPOINTS).values()
    kept = sum(file.stat().st_size for path in present for file in path.glob("*"))
    needed = one * (count + 1) - kept + snapshots_bytes(config, engines.averaged)
    if needed > free:
        print(
            f"warning: {folder} has {free:,} bytes free, but this run needs {needed:,} more for "
            f"the {count} checkpoints of checkpoint.keep={options.keep} and keep_every="
            f"{options.keep_every}, one being written, and the snapshots of ema.snapshot_every="
            f"{config.ema.snapshot_every}: free space or keep fewer, or saves will fail",
            file=sys.stderr,
            flush=True,
        )
    return ""


def _data_problem(task: TrainingTask, steps: tuple[int, int]) -> str:
    try:
        for step in steps:
            task.stream.check_access(step)
    except (OSError, ValueError) as error:
        return f"{task.stream.option}: {error}"
    return ""


class Rehearsal:
    """Forward and backward passes of every module on the first micro batch, without an update."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        task: TrainingTask,
        engines: Engines,
        steps: tuple[int, int],
    ) -> None:
        self._config, self._ranks = config, ranks
        self._task, self._engines = task, engines
        self._first_step, self._last_step = steps

    def run(self) -> float:
        """Run all passes; return the FLOPs of a sample, 0 if the device's peak is unknown.

        Raises: ValueError if the memory is too small.
        """
        with closing(self._task.stream.steps(self._first_step)) as steps:
            (batch,) = Feed(self._ranks.device).copied(next(steps)[:1])
        try:
            with self._undone():
                flops = self._flops(batch) if self._peak_known else 0.0
                for turn in self._turns():
                    self._engines[turn.module_name].rehearse(
                        lambda model, turn=turn: turn.loss(model, batch).mean
                    )
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise ValueError(self._out_of_memory()) from error
            raise
        return flops / len(batch.index)

    def peak(self) -> str:
        """Return the peak of the device's memory in words; empty for a CPU."""
        if self._ranks.device.type != "cuda":
            return ""
        peak = torch.cuda.max_memory_allocated(self._ranks.device)
        _, total = torch.cuda.mem_get_info(self._ranks.device)
        return f" ({peak / GIB:.1f} of {total / GIB:.1f} GiB)"

    @property
    def _peak_known(self) -> bool:
        return peak_flops_per_s(self._ranks.device, self._config.train.precision) is not None

    def _turns(self) -> Sequence[Turn]:
        """Return the turns of the last step, which trains every module; `close` is not called."""
        return self._task.turns(self._last_step)

    def _flops(self, batch: Batch) -> float:
        """Count the FLOPs of all modules for a micro batch.

        A backward pass counts as two forward passes (Chowdhery et al. 2022, appendix B).
        """
        total = 0
        for turn in self._turns():
            counted = CountedFlops(self._engines[turn.module_name].model)
            with torch.compiler.set_stance("force_eager"):  # the counter does not see compiled code
                turn.loss(counted, batch)
            total += 3 * counted.flops
        return float(total)

    @contextmanager
    def _undone(self) -> Generator[None]:
        """Restore buffers and generators at the end: a forward pass can change them."""
        buffers = [(buffer, buffer.clone()) for buffer in self._engines.buffers().values()]
        cuda = [self._ranks.device] if self._ranks.device.type == "cuda" else []
        with _torch.random.fork_rng(cuda):
            yield
        for buffer, value in buffers:
            buffer.copy_(value)

    def _out_of_memory(self) -> str:
        train, unet = self._config.train, self._config.unet
        fixes = [f"lower train.micro_batch_size={train.micro_batch_size}"]
        if not unet.gradient_checkpointing:
            fixes.append("set unet.gradient_checkpointing=true")
        if self._config.deepspeed.stage < 3:
            fixes.append("choose a higher deepspeed.stage")
        return (
            f"preflight: rank {self._ranks.rank} on {socket.gethostname()}: {self._ranks.device} "
            f"has not enough memory for a micro batch: {' or '.join(fixes)}"
        )


class CountedFlops(nn.Module):
    """A module that adds up the FLOPs of its calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self.flops = 0

    def forward(self, *inputs: Any) -> Any:
        """Call the module."""
        with FlopCounter() as counter:
            outputs = self._module(*inputs)
        self.flops += counter.flops
        return outputs
