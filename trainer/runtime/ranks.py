"""Rank, device and collectives of a process."""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from trainer.runtime.rendezvous import Place, meet

_torch: Any = torch  # torch declares no types for some of its functions

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""Longest time that a rank waits in a collective."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process of a job, and collectives among all processes of the job.

    All ranks must call the same collectives in the same order.
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Process group of the collectives; None: all ranks, in the main thread."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and commits files."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line once for all ranks."""
        if self.is_main:
            print(line, flush=True)

    def parts(self, count: int, size: int) -> Iterator[list[int]]:
        """Yield this rank's part of the batches of 0 … count-1.

        size: largest size of a batch. The batches do not depend on the world size.
        """
        for start in range(self.rank * size, count, self.world_size * size):
            yield list(range(start, min(start + size, count)))

    def barrier(self) -> None:
        """Wait for all ranks; collective."""
        if self.world_size > 1:
            dist.barrier(self.group)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; collective."""
        return self.maximum(float(flag)) > 0

    def maximum(self, value: float) -> float:
        """Return the largest value over all ranks; collective."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def begin_maximum(self, value: float) -> "PendingMaximum":
        """Begin to find the largest value over all ranks, and return at once; collective.

        On the ranks of `for_thread`, this process and its device do not wait.
        """
        result = torch.tensor(value, dtype=torch.float64)
        work = dist.all_reduce(result, dist.ReduceOp.MAX, self.group, async_op=True)
        return PendingMaximum(result, work)

    def mean(self, value: float) -> float:
        """Return the mean over all ranks; collective."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.world_size

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of the ranks; collective."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, self.group)
        return values

    def collect(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, an empty list elsewhere; collective."""
        if self.world_size == 1:
            return [value]
        values: list[T] | None = [value] * self.world_size if self.is_main else None
        dist.gather_object(value, values, group=self.group)
        return values or []

    def from_main(self, find: Callable[[], T]) -> T:
        """Call the function on rank 0, and return its value on every rank; collective."""
        found: list[T | None] = [find() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(found, src=0, group=self.group)
        return cast(T, found[0])

    def for_thread(self) -> "Ranks":
        """Return these ranks on the CPU with their own process group; collective.

        A background thread can use them, or collectives that run while others do.
        """
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return replace(self, device=torch.device("cpu"), group=group)

    def sum_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all ranks; collective."""
        if self.world_size == 1:
            return
        for name in sorted(tensors):
            total = tensors[name].to(self.device, copy=True)
            dist.all_reduce(total, group=self.group)
            tensors[name].copy_(total)

    def _reduce(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        if self.world_size == 1:
            return value
        result = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(result, operation, self.group)
        return result.item()


@dataclass(frozen=True, slots=True)
class PendingMaximum:
    """A maximum over ranks that is being found."""

    result: torch.Tensor
    work: dist.Work | None

    def value(self) -> float:
        """Wait for the maximum; collective."""
        if self.work is not None:
            self.work.wait()
        return self.result.item()


ALONE = Ranks(0, 1, torch.device("cpu"))
"""The ranks of a process outside a job."""


def join() -> Ranks:
    """Join the job that torchrun or srun started; a plain process is a job of one rank.

    Raises: ValueError if the launcher's variables contradict each other, or those of other ranks;
    OSError or RuntimeError of torch.distributed if the ranks do not connect.
    """
    place = Place.read(os.environ)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = choose_device(place, count)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # nearly all calls have the same few shapes
    # DeepSpeed takes the number of its device from the environment alone
    os.environ["LOCAL_RANK"] = str(device.index if device.type == "cuda" else place.local_rank)
    if not dist.is_initialized():
        store = _find_store(place)
        if device.type == "cuda":
            # before NCCL, which would end with an error that names no rank
            claim_card(store, place, str(_torch.cuda.get_device_properties(device).uuid))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=TIMEOUT,
            # NCCL then connects, or fails, at once and not at the first collective
            device_id=device if device.type == "cuda" else None,
        )
    return Ranks(place.rank, place.world_size, device)


def leave() -> None:
    """Leave the job, if this process has joined one, after its last collective.

    Gloo's threads may hold tensors of a collective that has ended. Releasing these takes Python's
    lock, and a thread that asks for it while Python ends aborts the process (SIGABRT), though all
    work is done. This call waits for the threads. A rank that ends with an error must not call it:
    its collectives may never end.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(place: Place, count: int) -> torch.device:
    """Return the GPU of this rank, one of `count` that CUDA_VISIBLE_DEVICES leaves, or the CPU.

    A launcher may show each rank its own GPU alone, or several ranks of a host the same ones.
    `claim_card` finds ranks that share one.
    """
    if count == 0:
        return torch.device("cpu")
    return torch.device("cuda", place.local_rank % count)


def claim_card(store: Any, place: Place, card: str) -> None:
    """Claim a GPU for this rank; card: its identifier, which differs between hosts, too.

    Raises: ValueError if another rank has claimed it.
    """
    # torchrun keeps its store when it starts all ranks again
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if store.add(f"card/{start}/{card}", 1) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ValueError(
            f"rank {place.rank} on {socket.gethostname()}, LOCAL_RANK={place.local_rank}, shares "
            f"its GPU with another rank (CUDA_VISIBLE_DEVICES: {visible}): start one task a GPU"
        )


def _find_store(place: Place) -> Any:
    """Return the store of torchrun or, from other launchers, the one of rank 0."""
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        return meet(place, TIMEOUT)
    store, *_ = next(
        _torch.distributed.rendezvous("env://", place.rank, place.world_size, timeout=TIMEOUT)
    )
    return store


def end_together(ranks: Ranks, reason: str) -> NoReturn:
    """End every rank with exit code 1; rank 0 prints the reason; collective."""
    if ranks.is_main:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    ranks.barrier()  # the launcher kills the others as soon as one rank has ended
    raise SystemExit(1)
