"""The trainer on one device: speed, the plan beside it, a stop, and deliberate faults."""

import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.gpu.jobs import (
    SMALL_NETWORK,
    STEPS,
    STOP_AT,
    config_of,
    losses,
    metrics,
    words_of,
)
from tests.benchmarks.gpu.setting import GIB, Setting
from tests.benchmarks.gpu.steps import BATCH, Form, our_step
from tests.support.faults import rewrite_latents
from trainer.checkpoints.writer import CheckpointWriter
from trainer.config.gpus import gpu_table
from trainer.plan.forecast import make_forecast, trace_step
from trainer.train.loop import TrainingLoop, fit
from trainer.train.stop import StopRequest

PROFILED_STEPS = 2
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
RUN = "run"


def measure(setting: Setting) -> None:
    """Note its speed, waits and memory, and a bare loop's speed."""
    config = config_of(setting, RUN)
    setting.begin_peak()
    with profiled_end(setting, config.train.max_steps):
        assert fit(config) == 0
    forget_checkpoints(setting, RUN)
    lines = metrics(setting.folder / RUN)
    lines = lines[1:-PROFILED_STEPS] or lines  # the first step is slow, and so are profiled ones
    rate = middle(lines, "throughput/images_per_s")
    setting.note("img_per_s", rate)
    setting.note("data_wait_pct", middle(lines, "time/data_wait_pct"))
    setting.note("mfu_pct", middle(lines, "throughput/mfu_pct"))
    setting.note("allocated_gib", max(line["memory/max_allocated_gib"] for line in lines))
    setting.note("reserved_gib", max(line.get("memory/max_reserved_gib", 0.0) for line in lines))
    bare = bare_rate(setting, config.train.global_batch_size // config.train.micro_batch_size)
    setting.note("bare_img_per_s", bare)
    setting.note("trainer_pct", 100 * rate / bare)
    images = config.train.global_batch_size
    setting.note("step_beyond_bare_ms", 1000 * (images / rate - images / bare))


def forget_checkpoints(setting: Setting, run: str) -> None:
    """Make room on the disk: one takes 14 GB."""
    shutil.rmtree(setting.folder / run / "checkpoints")


def middle(lines: list[dict[str, Any]], name: str) -> float:
    """The median over steps; 0 where it is not logged, as an MFU on a CPU."""
    return float(np.median([line.get(name, 0.0) for line in lines]))


@contextmanager
def profiled_end(setting: Setting, steps: int) -> Generator[None]:
    """Profile the last steps: host waits, copies from pageable memory, idle time of the GPU."""
    kinds = [ProfilerActivity.CUDA, ProfilerActivity.CPU][: 1 + (not setting.on_gpu)]
    profiler, train_step = profile(activities=kinds), TrainingLoop._train_step
    start_s = 0.0

    def watched(self: TrainingLoop, micro_batches: Any) -> bool:
        nonlocal start_s
        if self.state.step == steps - PROFILED_STEPS:
            setting.synchronize()
            profiler.start()
            start_s = time.perf_counter()
        spike = train_step(self, micro_batches)
        if self.state.step == steps:
            setting.synchronize()
            spent_s = time.perf_counter() - start_s
            profiler.stop()
            note_waits(setting, profiler, spent_s)
        return spike

    with mock.patch.object(TrainingLoop, "_train_step", watched):
        yield


def note_waits(setting: Setting, profiler: Any, spent_s: float) -> None:
    events = list(profiler.events() or ())
    waits = sum(event.name in WAITS for event in events)
    pageable = sum("Pageable" in event.name for event in events)
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    busy_s = sum(event.self_device_time_total for event in on_device) / 1e6
    setting.note("waits_per_step", waits / PROFILED_STEPS)
    setting.note("pageable_copies_per_step", pageable / PROFILED_STEPS)
    setting.note("idle_pct", 100 * (1 - busy_s / spent_s))


def bare_rate(setting: Setting, micro_batches: int) -> float:
    """Images a second of the same network with torch's fused AdamW, and nothing else."""
    form = Form("sdpa", checkpointing=False, channels_last=True)
    step, network = our_step(setting, form)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def train() -> None:
        for _ in range(micro_batches):
            step()
        optimizer.step()

    (spent_s,) = setting.median_s(train)
    return (BATCH if not setting.small else 2) * micro_batches / spent_s


def measure_plan(setting: Setting) -> None:
    """Note memory and speed of the training's row ÷ those of its plan."""
    name = "h100_80gb"
    if setting.on_gpu:
        chip = torch.cuda.get_device_name(setting.device).lower()
        name = next((one for one in gpu_table()["cards"] if one.partition("_")[0] in chip), name)
    alone = [f"plan.gpu={name}", "plan.nodes=1", "plan.gpus_per_node=1"]
    config = config_of(setting, RUN, *alone)
    forecast = make_forecast(config, trace_step(config))
    lines = metrics(setting.folder / RUN)
    measured_gib = max(line["memory/max_allocated_gib"] for line in lines)
    memory = forecast.memory
    for part in ("weights", "optimizer", "ema", "gradients", "activations"):
        setting.note(f"planned_{part}_gib", getattr(memory, part) / GIB)
    setting.note("planned_gib", memory.peak / GIB)
    setting.note("memory_ratio", measured_gib * GIB / memory.peak)
    setting.note("planned_img_per_s", forecast.images_per_s)
    rate = middle(lines, "throughput/images_per_s")
    setting.note("planned_rate_ratio", forecast.images_per_s / rate)


def measure_resume(setting: Setting) -> None:
    """Stop at a step, go on, and compare the losses with those of the training's row."""
    stop_at = 1 if setting.small else STOP_AT
    config = config_of(setting, "stopped")
    stalls: list[float] = []
    save = CheckpointWriter.save

    def timed(self: CheckpointWriter, *given: Any) -> None:
        start_s = time.perf_counter()
        save(self, *given)
        stalls.append(time.perf_counter() - start_s)

    with mock.patch.object(CheckpointWriter, "save", timed):
        with stopped(stop_at):
            setting.note("stop_code", fit(config))
        assert fit(config_of(setting, "stopped")) == 0
    whole, own = losses(setting.folder / RUN), losses(setting.folder / "stopped")
    assert len(whole) == len(own)
    differences = [abs(one - other) for one, other in zip(whole, own, strict=True)]
    setting.note("loss_difference", max(differences))
    size = sum(path.stat().st_size for path in Path(config.run.dir).rglob("step_*/*"))
    setting.note("checkpoints_gb", size / 1e9)
    forget_checkpoints(setting, "stopped")
    setting.note("stall_s", min(stalls))
    setting.note("to_host_gb_per_s", size / len(stalls) / 1e9 / min(stalls))


@contextmanager
def stopped(at: int) -> Generator[None]:
    """Signal this process just before it answers for the n-th time whether to stop."""
    answers, agreed = count(1), StopRequest.agreed

    def signalled(self: StopRequest, must: bool = False, *, late: bool = False) -> bool:
        if next(answers) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(self, must, late=late)

    with mock.patch.object(StopRequest, "agreed", signalled):
        yield


def measure_faults(setting: Setting) -> None:
    """A micro batch that is too large, and a sample that is no number."""
    words = words_of(setting, "too_large", "train.micro_batch_size=4096")
    if setting.on_gpu:
        words.append("train.global_batch_size=4096")
    end = end_of("trainer", words)
    print(end)
    line = end if isinstance(end, str) else ""
    setting.note("too_large_code", int(bool(end)))
    setting.note("too_large_lines", len(line.splitlines()))
    setting.note("too_large_named", int("train.micro_batch_size" in line))
    target = setting.folder / "poisoned"
    rewrite_latents(Path(config_of(setting, RUN).data.latents), target, {1: with_nan})
    epoch = f"train.max_steps={1 if setting.small else STEPS // 3}"
    assert fit(config_of(setting, "nan", f"data.latents={target}", epoch, *SMALL_NETWORK)) == 0
    skipped = sum(line["optim/skipped_steps"] for line in metrics(setting.folder / "nan")[-1:])
    setting.note("nan_steps_skipped", int(skipped))


def with_nan(moments: np.ndarray) -> np.ndarray:
    moments[0, 0, 0] = np.nan
    return moments


def end_of(module: str, words: list[str]) -> object:
    """How `python -m MODULE WORDS…` ends: its exit code, or the line that it prints for code 1."""
    with mock.patch.object(sys, "argv", [module, *words]):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code
    return 0
