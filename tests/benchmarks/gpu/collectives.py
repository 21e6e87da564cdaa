"""Bandwidth of collectives among the ranks of torchrun; rank 0 prints it as JSON.

The figures are those of a link's bus: bytes x 2 (n - 1) ÷ n for all-reduce, x (n - 1) ÷ n for
all-gather, in GB/s.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from trainer.runtime.ranks import Ranks, join

ROUNDS, WARM_UPS = 8, 3
_dist: Any = dist  # newer torch has another name for the function that all have


def main() -> None:
    """One argument: bytes."""
    ranks = join()
    size, count = int(sys.argv[1]), ranks.world_size
    whole = torch.zeros(size // 2, dtype=torch.bfloat16, device=ranks.device)
    part = whole[: len(whole) // count]
    gathered = whole[: len(part) * count].clone()
    all_reduce = median_s(ranks, lambda: dist.all_reduce(whole))
    all_gather = median_s(ranks, lambda: _dist.all_gather_into_tensor(gathered, part))
    figures = {
        "all_reduce_gb_per_s": 2 * size * (count - 1) / count / all_reduce / 1e9,
        "all_gather_gb_per_s": size * (count - 1) / count / all_gather / 1e9,
    }
    ranks.say(json.dumps(figures))
    dist.destroy_process_group()


def median_s(ranks: Ranks, call: Callable[[], Any]) -> float:
    """Of the slowest rank."""
    spent: list[float] = []
    for _ in range(WARM_UPS + ROUNDS):
        ranks.barrier()
        start_s = time.perf_counter()
        call()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        spent.append(time.perf_counter() - start_s)
    return ranks.maximum(statistics.median(spent[WARM_UPS:]))


if __name__ == "__main__":
    main()
