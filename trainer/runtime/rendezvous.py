"""The meeting of a job's ranks, before torch.distributed starts.

The launcher's variables are checked against each other. Then the ranks meet at a TCPStore of rank 0
and compare their numbers, so wrong numbers and a taken port end in an error and not in a wait. The
store has no password: it listens on the loopback interface unless the job has several nodes.
"""

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, Self

import torch.distributed

from trainer.runtime.launcher import world_size

_distributed: Any = torch.distributed  # it does not declare its stores

CONNECT_S = 4.0
"""Time in which a store answers, in seconds; a program that does not is no store."""
POLL_S = 0.1
WORD_AFTER_S = 20.0
"""Time after which waiting ranks print a line, in seconds."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A process's place in its job, as the launcher's variables state it."""

    rank: int
    world_size: int
    local_rank: int
    """Number among the ranks of its host."""

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Self:
        """Read the variables of torchrun or srun; a plain process is a job of one rank.

        WORLD_SIZE=1 alone makes one rank of each task of srun: independent runs, side by side.
        Raises: ValueError naming the variables that contradict each other.
        """
        world = world_size(variables)
        alone = world == 1 and not variables.get("RANK")
        rank = 0 if alone else _number(variables, "RANK", "SLURM_PROCID")
        local = _number(variables, "LOCAL_RANK", "SLURM_LOCALID")
        if rank >= world:
            raise ValueError(
                f"RANK={rank} does not fit WORLD_SIZE={world}: ranks count from 0 to {world - 1}; "
                "start with torchrun or sbatch slurm/train.sh, or unset both"
            )
        numbered = variables.get("RANK") or variables.get("SLURM_PROCID")
        if world > 1 and variables.get("WORLD_SIZE") and not numbered:
            raise ValueError(f"WORLD_SIZE={world} without RANK: start with torchrun, or set both")
        return cls(rank=rank, world_size=world, local_rank=local)


class Store(Protocol):
    """A store of torch.distributed: values by key, shared by all ranks."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a number, and return the sum."""
        ...

    def set(self, key: str, value: str, /) -> None:
        """Set a value."""

    def get(self, key: str, /) -> bytes:
        """Wait for a value."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Return whether all keys have values."""
        ...


def meet(place: Place, timeout: timedelta) -> Any:
    """Meet the other ranks; return the store for torch.distributed.

    timeout: longest wait for ranks that have not started yet.
    Raises: ValueError naming MASTER_ADDR, MASTER_PORT or RANK, also on ranks without a fault;
    OSError if ranks are missing after the timeout.
    """
    if place.world_size == 1:
        return _distributed.HashStore()  # nothing listens
    address, port = _address(place)
    name = f"{place.world_size} ranks of job {os.environ.get('SLURM_JOB_ID', '')}"
    with _Claim(f"{address}:{port} rank {place.rank}") as claim:
        if place.rank == 0:
            store = _serve(address, port, place, timeout, name)
        else:
            store = _connect(address, port, place, timeout, claim)
            _compare(store, address, port, name)
        _count(store, place, timeout)
    store.set_timeout(timeout)
    return store


def _address(place: Place) -> tuple[str, int]:
    """Return host and port of rank 0's store."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port:
        raise ValueError(
            f"MASTER_ADDR and MASTER_PORT are not set for {place.world_size} ranks: "
            "start them with sbatch slurm/train.sh or with torchrun"
        )
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"MASTER_PORT={port} is no port: give a number from 1024 to 65535")
    one_node = os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    address = LOOPBACK if one_node else host
    try:
        socket.getaddrinfo(address, int(port))
    except OSError as error:
        raise ValueError(f"MASTER_ADDR={host} is no host that is known here: {error}") from error
    return address, int(port)


def _serve(address: str, port: int, place: Place, timeout: timedelta, name: str) -> Any:
    """Listen at the port; on all interfaces only if MASTER_ADDR is no loopback address."""
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    local = found[4][0] == "::1" or str(found[4][0]).startswith("127.")
    listener = socket.socket(found[0], socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(found[4] if local else ("", port))
        listener.listen(place.world_size)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(_taken(address, port, place, name)) from error
        raise ValueError(f"MASTER_ADDR={address}: rank 0 cannot listen there: {error}") from error
    store = _open(address, port, place, timeout, listener.detach())
    store.set("job", name)
    return store


def _taken(address: str, port: int, place: Place, name: str) -> str:
    """Explain why rank 0 cannot listen; if another rank 0 of this job does, tell that one, too."""
    problem = _doubled(place)
    other = _try_open(address, port, place)
    if other is not None and _job(other) == name:
        other.set("problem", problem)
        return problem
    return f"MASTER_PORT={port} on {address} is taken by another program: choose another port"


class _Claim:
    """A rank's claim to its number on its host: two alike meet here even without a rank 0.

    It is a socket in the kernel's memory, where the kernel has such (Linux), and no file.
    """

    def __init__(self, words: str) -> None:
        name = f"\0latent-foundry user {os.geteuid()} {words}"
        self._doubled = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(name)
            self._socket.listen()
        except OSError as error:
            self._doubled = error.errno == errno.EADDRINUSE
            with contextlib.suppress(OSError):
                self._socket.connect(name)

    def doubled(self) -> bool:
        """Return whether another process of this host has the same number."""
        with contextlib.suppress(OSError):  # nobody has come
            self._socket.accept()[0].close()
            self._doubled = True
        return self._doubled

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()


def _connect(address: str, port: int, place: Place, timeout: timedelta, claim: _Claim) -> Any:
    start_s = time.monotonic()
    said = False
    while True:
        try:
            socket.create_connection((address, port), CONNECT_S).close()
            break
        except OSError as error:
            waited_s = time.monotonic() - start_s
            if waited_s > CONNECT_S and claim.doubled():
                raise ValueError(_doubled(place)) from error
            if waited_s > timeout.total_seconds():
                raise OSError(
                    f"rank {place.rank}: no rank 0 at MASTER_ADDR={address} MASTER_PORT={port} "
                    f"after {waited_s:.0f} s: {error}"
                ) from error
            if waited_s > WORD_AFTER_S and not said:
                said = True
                _say(f"rank {place.rank} waits for rank 0 at {address}:{port}")
            time.sleep(POLL_S)
    store = _try_open(address, port, place)
    if store is None:
        raise ValueError(
            f"MASTER_PORT={port} on {address} belongs to another program: choose another port"
        )
    return store


def _compare(store: Store, address: str, port: int, name: str) -> None:
    """Raise ValueError if rank 0 belongs to another job, before anything is written."""
    found = _job(store)
    if found != name:
        raise ValueError(
            f"MASTER_PORT={port} on {address} belongs to {found or 'another program'}, not to "
            f"{name.strip()}: give all ranks the same WORLD_SIZE, and each job its own port"
        )


def _count(store: Store, place: Place, timeout: timedelta) -> None:
    """Wait for all ranks. Raises: ValueError on every rank if two have the same number."""
    if store.add(f"rank {place.rank}", 1) > 1:
        problem = _doubled(place)
        store.set("problem", problem)
    store.add("present", 1)
    start_s, said = time.monotonic(), False
    while True:
        if store.check(["problem"]):
            problem = store.get("problem").decode()
            time.sleep(3 * POLL_S if place.rank else CONNECT_S)  # rank 0 has the store
            raise ValueError(problem)
        if store.add("present", 0) >= place.world_size:
            return
        waited_s = time.monotonic() - start_s
        if waited_s > WORD_AFTER_S and not said:
            said = True
            if place.rank == 0:
                _say(f"waiting for rank {_missing(store, place)}")
        if waited_s > timeout.total_seconds():
            raise OSError(f"rank {_missing(store, place)} did not start in {waited_s:.0f} s")
        time.sleep(POLL_S)


def _doubled(place: Place) -> str:
    return f"RANK={place.rank} was given to two processes: give each rank its own number"


def _missing(store: Store, place: Place) -> str:
    return ", ".join(
        str(rank) for rank in range(place.world_size) if not store.check([f"rank {rank}"])
    )


def _job(store: Store) -> str:
    """Return the name of the job that a store belongs to; empty if it has none."""
    start_s = time.monotonic()
    while not store.check(["job"]):
        if time.monotonic() - start_s > CONNECT_S:
            return ""
        time.sleep(POLL_S)
    return store.get("job").decode(errors="replace")


def _open(
    address: str, port: int, place: Place, timeout: timedelta, listener: int | None = None
) -> Any:
    return _distributed.TCPStore(
        address,
        port,
        place.world_size,
        listener is not None,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def _try_open(address: str, port: int, place: Place) -> Store | None:
    """Connect to a store; None if another program answers or none. torch would wait for ever."""
    found: list[Store] = []

    def connect() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(_open(address, port, place, timedelta(seconds=CONNECT_S)))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_S + 1)
    return found[0] if found else None


def _number(variables: Mapping[str, str], *names: str) -> int:
    """Return the first of these variables that is set, 0 without one."""
    for name in names:
        if word := variables.get(name):
            if not word.isdecimal():
                raise ValueError(f"{name}={word} is no number")
            return int(word)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
