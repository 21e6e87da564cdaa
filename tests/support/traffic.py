"""Bytes that ranks send in a step, as counted by `tests.support.count_traffic` and as planned."""

import json
from pathlib import Path

from trainer.config import Config
from trainer.plan.costs import ring_bytes
from trainer.plan.forecast import layout_of, trace_step, work_of


def planned_bytes(config: Config, ranks: int) -> float:
    """The bytes that a rank sends in a step, by the plan."""
    traced = trace_step(config, device="cpu")
    layout = layout_of(config, traced, ranks=ranks)
    work = work_of(config, traced, layout)
    return ring_bytes(work.stage, work) * (ranks - 1) / ranks


def sent_bytes(file: Path, ranks: int) -> list[list[dict[str, int]]]:
    """What each rank sent in the second step of each run."""
    texts = [Path(f"{file}.{rank}").read_text() for rank in range(ranks)]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]
