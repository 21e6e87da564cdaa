"""A training whose ranks count the bytes that they send, by collective.

python -m tests.support.count_traffic FILE -m MODULE WORDS…: run `python -m MODULE WORDS…`. For each
step from the second on, rank R adds a line to FILE.R. It maps the name of a collective to the bytes
that a ring sends from this rank (Patarasuk and Yuan 2009).
"""

import inspect
import json
import os
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

SENT = {
    "all_reduce": (2, "tensor"),
    "all_gather": (1, "tensor_list"),
    "all_gather_into_tensor": (1, "output_tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "broadcast": (1, "tensor"),
    "reduce": (1, "tensor"),
}
"""Collective → how often a ring sends all W parts but one of the data, and the argument that has
them."""


def num_bytes(data: Tensor | Sequence[Tensor]) -> int:
    tensors = [data] if isinstance(data, Tensor) else data
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(name: str, sent: Counter[str]) -> None:
    """Count the calls of a collective of torch.distributed."""
    collective: Callable[..., Any] = getattr(dist, name)
    signature, (times, whole) = inspect.signature(collective), SENT[name]

    def counted(*given: Any, **named: Any) -> Any:
        arguments = signature.bind(*given, **named).arguments
        ranks = dist.get_world_size(arguments.get("group"))
        sent[name] += round(times * num_bytes(arguments[whole]) * (ranks - 1) / ranks)
        return collective(*given, **named)

    setattr(dist, name, counted)


def main() -> None:
    file, _, module, *words = sys.argv[1:]
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    sent: Counter[str] = Counter()
    for name in SENT:
        count(name, sent)

    from trainer.train.watchdog import Watchdog

    step_of_watchdog = Watchdog.step

    def counted_step(self: Watchdog, step: int) -> None:
        """Called when a step begins."""
        if step > 1:
            with Path(f"{file}.{rank}").open("a") as lines:
                lines.write(json.dumps(sent) + "\n")
        sent.clear()
        step_of_watchdog(self, step)

    Watchdog.step = counted_step
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
