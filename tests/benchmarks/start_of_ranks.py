"""What ranks without a model send and wait before the first step, for 4 to 64 ranks on one machine.

Ranks meet, make a second process group, and exchange what the trainer exchanges: facts of each rank
on all ranks (gather) and on rank 0 (collect), a word of rank 0 (from_main), a sum. All bytes of the
loopback device are counted, in a network namespace of its own, which only root can make.
Prints a line of JSON for each number of ranks: phase → [KB a rank, seconds].
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.cluster import free_ports
from trainer.runtime.ranks import Ranks, join

WORLDS = (4, 8, 16, 64)
FACTS = {"host": "node", "versions": {f"library {number}": "1.2.3" for number in range(30)}}
"""About as much as the check before the first step compares, 1 KB."""


def loopback_bytes() -> int:
    (line,) = (one for one in Path("/proc/net/dev").read_text().splitlines() if "lo:" in one)
    return int(line.split()[1])


def rank(number: int, world: int, port: int, answers: Any) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    held: list[Ranks] = []
    found: dict[str, tuple[float, float]] = {}

    def phase(name: str, call: Callable[[], object]) -> None:
        if held:
            held[0].barrier()
        start_bytes, start_s = loopback_bytes(), time.perf_counter()
        call()
        if held:
            held[0].barrier()
        seconds = time.perf_counter() - start_s
        found[name] = ((loopback_bytes() - start_bytes) / world / 1000, seconds)

    phase("meet", lambda: held.append(join()))
    ranks = held[0]
    phase("barrier", lambda: None)
    phase("group", ranks.for_thread)
    phase("gather", lambda: ranks.gather(FACTS))
    phase("collect", lambda: ranks.collect(FACTS))
    phase("from_main", lambda: ranks.from_main(lambda: FACTS))
    phase("sum", lambda: ranks.sum_({"table": torch.zeros(2, world, dtype=torch.float64)}))
    if ranks.is_main:
        answers.put(found)
    ranks.barrier()
    dist.destroy_process_group()


def measure(world: int) -> dict[str, tuple[float, float]]:
    """Start so many ranks, and return what rank 0 saw."""
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    (port,) = free_ports(1)
    processes = [
        context.Process(target=rank, args=(number, world, port, answers)) for number in range(world)
    ]
    for process in processes:
        process.start()
    found = answers.get(timeout=250)
    for process in processes:
        process.join()
    return found


def main() -> None:
    if "--inside" not in sys.argv:
        words = [sys.executable, "-m", "tests.benchmarks.start_of_ranks", "--inside", *sys.argv[1:]]
        script = 'ip link set lo up && exec "$@"'
        subprocess.run(["unshare", "--net", "bash", "-c", script, "inside", *words], check=True)
        return
    worlds = [int(word) for word in sys.argv[2:]] or WORLDS
    for world in worlds:
        found = measure(world)
        print(
            json.dumps({"ranks": world} | {k: [round(x, 2) for x in v] for k, v in found.items()}),
            flush=True,
        )


if __name__ == "__main__":
    main()
