"""What would fail at 3 a.m. fails now: checks on every rank before the first step, in one line."""

import hashlib
import json
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.stream import Batch
from trainer.config import Config
from trainer.devices import peak_flops_per_s
from trainer.distributed import Ranks
from trainer.engines import Engines
from trainer.guards import end_together
from trainer.runs import describe, versions
from trainer.tasks import TrainingTask

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank says of itself."""

    host: str
    device: str
    """Its name."""
    device_id: str
    """What sets it apart from the host's others; empty for a CPU."""
    versions: dict[str, str]
    config: str
    """Hash of the config."""
    problem: str


def preflight(
    config: Config,
    ranks: Ranks,
    task: TrainingTask,
    engines: Engines,
    steps: tuple[int, int],
) -> float:
    """Check ranks, versions, disk, shards, and a whole micro batch forward and backward.

    steps: the first and the last step of the data's plan that this start will train.
    Returns the FLOPs of a sample's forward and backward pass, 0 where the device's peak is
    unknown. Weights, moments, buffers, generators and the order of data stay as they are.
    Raises: SystemExit after one line about what all ranks know; ValueError about this one's memory.
    """
    start_s = time.perf_counter()
    checkpoint_bytes = engines.num_bytes()
    problem = _data_problem(task, steps)
    if ranks.is_main:
        problem = problem or _disk_problem(config, checkpoint_bytes)
    reports = ranks.gather(_report(config, ranks, problem))
    problems = list(disagreements(reports))
    if problems:
        end_together(ranks, f"preflight: {'; '.join(problems)}")
    trial = Trial(config, ranks, task, engines, steps)
    flops = trial.run()
    slowest_s = ranks.maximum(time.perf_counter() - start_s)
    if ranks.is_main:
        devices = Counter(report.device for report in reports)
        named = ", ".join(f"{count} x {device}" for device, count in devices.items())
        free_bytes = shutil.disk_usage(config.run.dir).free
        print(
            f"preflight: {len(reports)} rank(s) on {len({r.host for r in reports})} host(s) "
            f"({named}), versions alike, shards open, {checkpoint_bytes / GIB:.2f} GiB a "
            f"checkpoint and {free_bytes / GIB:.0f} GiB free, a trial batch of "
            f"{config.train.micro_batch_size} fits{trial.peak()}; {slowest_s:.1f} s",
            flush=True,
        )
    return flops


def disagreements(reports: Sequence[Report]) -> Iterator[str]:
    """What is wrong with any rank, or between them, in words that name the ranks."""
    first = reports[0]
    holders: dict[tuple[str, str], int] = {}
    for rank, report in enumerate(reports):
        who = f"rank {rank} on {report.host}"
        if report.problem:
            yield f"{who}: {report.problem}"
        if report.device != first.device:
            yield (
                f"{who} has {report.device}, but rank 0 on {first.host} has {first.device}: ask "
                "for nodes of one kind in slurm/cluster.env"
            )
        differing = [
            f"{name} {report.versions.get(name)} and not {version}"
            for name, version in first.versions.items()
            if report.versions.get(name) != version
        ]
        if differing:
            yield f"{who} has {', '.join(differing)}: give all nodes the same environment"
        if report.config != first.config:
            yield f"{who} has another config than rank 0: start all ranks with one command"
        if report.device_id:
            other = holders.setdefault((report.host, report.device_id), rank)
            if other != rank:
                yield f"{who} shares its GPU with rank {other}: start one task a GPU"


def _report(config: Config, ranks: Ranks, problem: str) -> Report:
    cuda = ranks.device.type == "cuda"
    text = json.dumps(describe(config), sort_keys=True)
    return Report(
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(ranks.device) if cuda else "CPU",
        device_id=str(torch.cuda.get_device_properties(ranks.device).uuid) if cuda else "",
        versions=versions(),
        config=hashlib.sha256(text.encode()).hexdigest(),
        problem=problem,
    )


def _disk_problem(config: Config, checkpoint_bytes: int) -> str:
    """Whether all checkpoints that are to stay, and the one being written, have no room."""
    folder, options = Path(config.run.dir), config.checkpoint
    every = config.train.max_steps // options.keep_every if options.keep_every else 0
    count = options.keep + every + bool(options.best) + 1
    kept = sum(file.stat().st_size for file in folder.glob("checkpoints/step_*/*"))
    needed = checkpoint_bytes * count - kept
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return ""
    return (
        f"{folder} has {free / GIB:.2f} GiB free, but the {count} checkpoints of checkpoint.keep="
        f"{options.keep} and keep_every={options.keep_every}, with the one being written, need "
        f"{needed / GIB:.2f} GiB more: free space, keep fewer, or choose another run.dir"
    )


def _data_problem(task: TrainingTask, steps: tuple[int, int]) -> str:
    try:
        for step in steps:
            task.stream.check_access(step)
    except (OSError, ValueError) as error:
        return f"{task.stream.option}: {error}"
    return ""


class Trial:
    """The first micro batch, forward and backward through every module, without any effect."""

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
        # the last step trains all that the run ever trains
        self._turns = task.turns(self._last_step)

    def run(self) -> float:
        """See preflight; returns FLOPs a sample."""
        with closing(self._task.stream.steps(self._first_step)) as steps:
            batch = next(steps)[0]
        try:
            with self._undone():
                flops = self._flops(batch) if self._peak_known else 0.0
                for name in self._turns:
                    self._engines[name].rehearse(
                        lambda model, name=name: self._loss(name, model, batch)
                    )
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise ValueError(self._out_of_memory()) from error
            raise
        return flops / len(batch.index)

    def peak(self) -> str:
        """What the device's memory held at most, in words for the summary."""
        if self._ranks.device.type != "cuda":
            return ""
        peak = torch.cuda.max_memory_allocated(self._ranks.device)
        total = torch.cuda.get_device_properties(self._ranks.device).total_memory
        return f" ({peak / GIB:.1f} of {total / GIB:.1f} GiB)"

    @property
    def _peak_known(self) -> bool:
        return peak_flops_per_s(self._ranks.device, self._config.train.precision) is not None

    def _loss(self, name: str, model: nn.Module, batch: Batch) -> Tensor:
        return next(iter(self._task.losses(name, model, [batch], self._last_step))).mean

    def _flops(self, batch: Batch) -> float:
        """Of all trained modules; a backward pass counts as two forward ones (PaLM, appendix B)."""
        total = 0
        for name in self._turns:
            counted = CountedFlops(self._engines[name].model)
            with torch.compiler.set_stance("force_eager"):  # compiled code cannot be counted
                self._loss(name, counted, batch)
            total += 3 * counted.flops
        return float(total)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Put back what a loss may change: buffers, generators and the task's state."""
        state: dict[str, Any] = self._task.state()
        buffers = [(buffer, buffer.clone()) for buffer in self._engines.buffers().values()]
        cuda = [self._ranks.device] if self._ranks.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            yield
        for buffer, value in buffers:
            buffer.copy_(value)
        self._task.load(state)

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
        with FlopCounterMode(display=False) as counter:
            outputs = self._module(*inputs)
        self.flops += counter.get_total_flops()
        return outputs
