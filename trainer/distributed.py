"""Who am I among the ranks, and what do all ranks agree on."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from trainer.checks import world_size

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""After which a rank that waits for another gives up."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place in the job."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Who takes part in collectives; empty is all, in the main thread."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which talks and commits."""
        return self.rank == 0

    def parts(self, count: int, size: int) -> Iterator[list[int]]:
        """This rank's share of items 0 … count-1, in batches that no number of ranks changes."""
        for start in range(self.rank * size, count, self.world_size * size):
            yield list(range(start, min(start + size, count)))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(self.group)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; collective."""
        return self.maximum(float(flag)) > 0

    def maximum(self, value: float) -> float:
        """The largest value over all ranks; collective."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return largest.item()

    def mean(self, value: float) -> float:
        """The mean over all ranks; collective."""
        total = {"": torch.tensor(value, dtype=torch.float64)}
        self.sum_(total)
        return total[""].item() / self.world_size

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks; collective."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, self.group)
        return values

    def collect(self, value: T) -> list[T]:
        """On rank 0 every rank's value, in the order of the ranks; else nothing; collective."""
        if self.world_size == 1:
            return [value]
        values: list[T] | None = [value] * self.world_size if self.is_main else None
        dist.gather_object(value, values, group=self.group)
        return values or []

    def first(self, value: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank; collective. The others do not look."""
        return self.gather([value()] if self.is_main else [])[0][0]

    def apart(self) -> "Ranks":
        """The same ranks for a background thread, whose collectives do not mix with others'."""
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return replace(self, device=torch.device("cpu"), group=group)

    def sum_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks; collective, in the order of the names."""
        if self.world_size == 1:
            return
        for name in sorted(tensors):
            total = tensors[name].to(self.device, copy=True)
            dist.all_reduce(total, group=self.group)
            tensors[name].copy_(total)


ALONE = Ranks(0, 1, torch.device("cpu"))
"""A process that is no part of a job."""


def join() -> Ranks:
    """Join the job that torchrun or srun started; a plain process is a job of one.

    Raises: ValueError if srun started several ranks and did not tell them where to meet; OSError or
    RuntimeError of torch.distributed if they do not.
    """
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    world = world_size()
    if world > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"MASTER_ADDR and MASTER_PORT are not set for {world} ranks: "
            "start them with sbatch slurm/train.sh or with torchrun"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    os.environ.setdefault("LOCAL_RANK", str(local))  # DeepSpeed takes it from nowhere else
    if not dist.is_initialized():
        # a process without a launcher is a job of one, on any free port
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
        )
    return Ranks(rank, world, device)
