"""Where a row of the GPU benchmark runs, and what it notes."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.config import UNetConfig
from tests.benchmarks.gpu.rows import Figure

GIB = 2**30
WARM_UPS, ROUNDS = 3, 8
SMALL_UNET = UNetConfig(
    block_out_channels=[16, 32],
    layers_per_block=1,
    attention=[False, True],
    heads=[1, 2],
    context_dim=32,
    norm_groups=8,
)
"""Of the small form."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row's device, size and files."""

    device: torch.device
    small: bool
    """Tiny networks: every line runs, and the figures mean nothing."""
    folder: Path
    """Of all rows; a row may read what an earlier one left there."""
    notes: Path
    """A file of one figure a line."""
    gpus: int = 1

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    def note(self, name: str, value: Figure) -> None:
        """Keep a figure at once: it stays if the row is stopped later."""
        value = float(f"{value:.4g}") if isinstance(value, float) else value
        with self.notes.open("a") as file:
            file.write(json.dumps([name, value]) + "\n")

    def unet(self, *, checkpointing: bool = False) -> UNetConfig:
        """Stable Diffusion 2's, or a small one."""
        from tests.support.unet_files import described_unet  # without YAML, some rows still run

        config = SMALL_UNET if self.small else described_unet("sd2")
        return replace(config, gradient_checkpointing=checkpointing)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def median_s(self, *calls: Callable[[], Any]) -> list[float]:
        """Median seconds of each call, in turns after warm-ups; by events on a GPU."""
        spent: list[list[float]] = [[] for _ in calls]
        warm_ups, rounds = (1, 1) if self.small else (WARM_UPS, ROUNDS)
        for _ in range(warm_ups + rounds):
            for call, times in zip(calls, spent, strict=True):
                times.append(self.seconds(call))
        return [statistics.median(times[warm_ups:]) for times in spent]

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of one call; by events on a GPU."""
        if not self.on_gpu:
            start_s = time.perf_counter()
            call()
            return time.perf_counter() - start_s
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def begin_peak(self) -> None:
        """Measure peaks of memory from here on."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> tuple[float, float]:
        """Allocated and reserved memory at their peaks; zeros on a CPU."""
        if not self.on_gpu:
            return 0.0, 0.0
        allocated = torch.cuda.max_memory_allocated(self.device)
        return allocated / GIB, torch.cuda.max_memory_reserved(self.device) / GIB
