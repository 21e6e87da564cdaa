"""Runs a row of the GPU benchmark in a process of its own, with a limit."""

import importlib
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.gpu.rows import Figure, Prediction, Row, figure_lines, is_within, read_notes

DONE, FAILED, NOT_REACHED, LEFT_OUT = "done", "failed", "not reached", "left out"


class Job(NamedTuple):
    """What all rows share."""

    device: str
    small: bool
    gpus: int
    folder: Path
    """Of files that later rows read."""
    log: Path
    """Everything that rows print."""


@dataclass(slots=True)
class Result:
    """One row, as it stands in gpu.json."""

    row: str
    state: str
    why: str = ""
    seconds: float = 0.0
    figures: dict[str, Figure] = field(default_factory=dict[str, Figure])
    within: dict[str, bool] = field(default_factory=dict[str, bool])


def run(row: Row, job: Job, context: ForkServerContext, left_s: float) -> Result:
    """Run a row in a process, and kill the process and its children at the limit."""
    if missing := row.missing():
        return Result(row.name, LEFT_OUT, f"needs {', '.join(missing)}")
    if left_s < row.seconds:
        return Result(row.name, NOT_REACHED, f"{left_s:.0f} s left of {row.seconds}")
    notes = job.folder / f"{row.name}.notes"
    process = context.Process(target=measure, args=(row, job, notes))
    start_s = time.monotonic()
    process.start()
    process.join(min(left_s, 2 * row.seconds))
    spent_s = round(time.monotonic() - start_s, 1)
    stopped = process.is_alive()
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()  # it may not have had time to begin its group
    process.join()
    figures = read_notes(notes)
    error = str(figures.pop("error", ""))
    if stopped:
        error = f"stopped after {spent_s} s"
    elif process.exitcode and not error:
        error = f"exit code {process.exitcode}"
    return Result(row.name, FAILED if error else DONE, error, spent_s, figures)


def measure(row: Row, job: Job, notes: Path) -> None:
    """Call a row's function, in its own process and process group."""
    os.setsid()
    with job.log.open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    print(f"--- {row.name}: {row.about}", flush=True)
    import torch

    from tests.benchmarks.gpu.setting import Setting

    setting = Setting(torch.device(job.device), job.small, job.folder, notes, job.gpus)
    module, name = row.function.split(":")
    try:
        if setting.on_gpu:
            torch.cuda.init()  # peaks of memory cannot be reset before
            torch.backends.cudnn.benchmark = True  # as in a training
        torch.manual_seed(0)
        getattr(importlib.import_module(f"tests.benchmarks.gpu.{module}"), name)(setting)
    except Exception as error:
        traceback.print_exc()
        setting.note("error", f"{type(error).__name__}: {error}"[:300])
        raise SystemExit(1) from None


def judge(result: Result, predicted: dict[str, Prediction], *, on_gpu: bool) -> None:
    """Compare with the predictions, and print the row."""
    if on_gpu:
        named = [name for name in predicted if name in result.figures]
        result.within = {name: is_within(result.figures[name], predicted[name]) for name in named}
    why = f": {result.why}" if result.why else ""
    print(f"{result.row}: {result.state}{why} ({result.seconds} s)")
    for line in figure_lines(result.figures, predicted, on_gpu=on_gpu):
        print(line)
    sys.stdout.flush()


def summary(results: list[Result]) -> str:
    """The last line."""
    within = [one for result in results for one in result.within.values()]
    states = [result.state for result in results]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in (DONE, FAILED, LEFT_OUT, NOT_REACHED)
    )
    return f"rows: {counts}; predictions: {sum(within)} within, {len(within) - sum(within)} not"
