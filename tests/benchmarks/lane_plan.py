"""What the plan of a billion samples costs: `python -m tests.benchmarks.lane_plan`.

10^9 samples in 100,000 shards of random sizes, 1024 ranks, 8 a node. The last line is JSON:

- `plan_s`, `plan_mb`: building the plan and its first global batch; time, growth of the process.
- `seek_ms`: the slowest first step of a rank, over random ranks and steps; for each the best of
  three fresh plans, so that another process's turn on the core does not count.
- `cursor_bytes`: of the cursor's JSON.
- `node_reads`: the most that a node reads in an epoch, in samples of whole shards, divided by its
  even share. Each lane counts alone: a shard cut between two lanes is read twice, even by one node.
"""

import json
import time

import numpy as np
import psutil

from data.order.cursor import VERSION, Cursor
from data.order.lanes import LanePlan

SAMPLES, SHARDS, RANKS, NODE_RANKS = 10**9, 100_000, 1024, 8
LANES, BLOCK, GLOBAL_BATCH = 1024, 4096, 8192
SEEKS, COUNTED_NODES = 50, 4


def main() -> None:
    draws = np.random.default_rng(0)
    sizes = draws.multinomial(SAMPLES, draws.dirichlet(np.full(SHARDS, 20.0))).astype(np.int64)
    print(f"{SHARDS} shards of {sizes.min()} to {sizes.max()} samples, {LANES} lanes")
    process = psutil.Process()
    before_bytes, start_s = process.memory_info().rss, time.perf_counter()
    plan = plan_of(sizes)
    plan.step(0)
    plan_s = time.perf_counter() - start_s
    plan_mb = (process.memory_info().rss - before_bytes) / 1e6
    epoch_steps = plan.lane_samples * LANES // GLOBAL_BATCH
    steps, ranks = draws.integers(0, 100 * epoch_steps, SEEKS), draws.integers(0, RANKS, SEEKS)
    seek_s = max(
        min(cold_seek_s(sizes, step, rank) for _ in range(3))
        for step, rank in zip(steps.tolist(), ranks.tolist(), strict=True)
    )
    nodes = draws.choice(RANKS // NODE_RANKS, COUNTED_NODES, replace=False)
    reads = max(samples_read(sizes, node) for node in nodes.tolist())
    result = {
        "plan_s": round(plan_s, 3),
        "plan_mb": round(plan_mb, 1),
        "seek_ms": round(seek_s * 1e3, 2),
        "cursor_bytes": len(json.dumps(cursor_of(plan, 10**6).to_json())),
        "node_reads": round(reads / (SAMPLES * NODE_RANKS / RANKS), 4),
    }
    print(json.dumps(result))


def plan_of(sizes: np.ndarray, global_batch: int = GLOBAL_BATCH) -> LanePlan:
    return LanePlan(sizes, seed=1, lanes=LANES, block=BLOCK, global_batch=global_batch)


def cursor_of(plan: LanePlan, step: int) -> Cursor:
    return Cursor(
        version=VERSION,
        manifest_hash="0" * 64,
        seed=2**63,
        lanes=plan.lanes,
        block=plan.block,
        global_batch=plan.global_batch,
        samples=step * plan.global_batch,
    )


def cold_seek_s(sizes: np.ndarray, step: int, rank: int) -> float:
    plan = plan_of(sizes)
    start_s = time.perf_counter()
    plan.rank_slice(step, rank, RANKS)
    return time.perf_counter() - start_s


def samples_read(sizes: np.ndarray, node: int) -> int:
    """Add up the shards of the samples that each lane of a node gives in the first epoch."""
    plan, ends = plan_of(sizes, LANES * BLOCK), np.cumsum(sizes)  # a step is a block of every lane
    read = set[int]()
    for step in range(-(-plan.lane_samples // BLOCK)):
        epoch, index = plan.rank_slice(step, node, RANKS // NODE_RANKS)
        lanes, shards = np.arange(len(index)) // BLOCK, np.searchsorted(ends, index, side="right")
        read.update(np.unique((lanes * SHARDS + shards)[epoch == 0]).tolist())
    return sum(int(sizes[number % SHARDS]) for number in read)


if __name__ == "__main__":
    main()
