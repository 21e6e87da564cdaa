"""Commands of the project in processes of their own.

A new Python imports torch, DeepSpeed and transformers for longer than most tests need. `Command`
forks a process that has imported them already: the same `__main__.py` runs, with its own arguments,
environment, output and exit code. `torchrun` starts new Pythons, and so do tests of what happens
before the first step.
"""

import atexit
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch
from torch.distributed.elastic.utils.distributed import create_c10d_store

from tests.support.forked import run_module
from tests.support.paths import ROOT

PRELOADED = [
    # what a command imports when it first needs it, and what DeepSpeed does at its first engine
    *("open_clip", "transformers", "torch._dynamo", "wandb"),
    "deepspeed.runtime.zero.muon.muon_optimizer",
    *(f"trainer.{name}.job" for name in ("clip", "ema", "evaluate", "export", "pack", "plan")),
    *("trainer.precompute.job", "trainer.sample.job", "trainer.train.loop"),
    *("trainer.evaluate.sweep", "trainer.report.page"),
    *("tests.support.forked", "tests.support.latent_jobs"),
]
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Ended:
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Everything that it printed."""
        return self.out + self.err


class Command:
    """`python -m MODULE WORDS…`, as one process or as the ranks that torchrun would start."""

    def __init__(
        self,
        module: str,
        words: Sequence[str | Path],
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        number = next(_numbers)
        self._files = [_folder / f"{number}.{kind}" for kind in ("out", "err")]
        for file in self._files:
            file.touch()
        whole = {"OMP_NUM_THREADS": str(torch.get_num_threads())} if ranks == 1 else {}
        whole = {**os.environ, **whole, **(environment or {})}
        if ranks > 1:
            # the store lives here, like that of torchrun's agent: its port is taken from the start
            self._store = create_c10d_store(True, "127.0.0.1", wait_for_workers=False)
            whole |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
            whole |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
            whole |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self._ranks: list[BaseProcess] = []
        _running.append(self)
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            process = forks.Process(
                target=run_module, args=(module, [*map(str, words)], whole | own, *self._files)
            )
            process.start()
            self._ranks.append(process)

    @property
    def pid(self) -> int:
        """The process id of rank 0."""
        return self._ranks[0].pid or 0

    def poll(self) -> int | None:
        """The exit code, or None. The first rank that fails ends the others, as with torchrun."""
        codes = [process.exitcode for process in self._ranks]
        failed = next(filter(None, codes), None)
        if failed is not None:
            self.kill()
            return failed
        return None if None in codes else 0

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank that is alive."""
        for process in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    def kill(self) -> None:
        """Kill every rank and its children at once."""
        for process in self._ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
        for process in self._ranks:
            process.join(60)
        if self in _running:
            _running.remove(self)

    def finish(self, timeout_s: float = 300) -> Ended:
        """Wait for the end. A command that takes longer is killed, and fails the test."""
        deadline_s = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline_s:
                self.kill()
                raise AssertionError(f"no end after {timeout_s} s: {self.printed()}")
            time.sleep(0.005)
        if self in _running:
            _running.remove(self)
        return Ended(code, *self.printed())

    def printed(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        out, err = (file.read_text() for file in self._files)
        return out, err


_numbers = itertools.count()
_folder = Path(tempfile.mkdtemp(prefix="commands-"))
_running: list[Command] = []


@atexit.register
def _end() -> None:
    """Kill what a failed test left behind, for which multiprocessing would wait."""
    while _running:
        _running[-1].kill()
    shutil.rmtree(_folder, ignore_errors=True)


def start(overrides: Sequence[str], ranks: int = 1) -> Command:
    """Start a training."""
    return Command("trainer", overrides, ranks)


def run_command(module: str, *words: str | Path, ranks: int = 1, **environment: str) -> Ended:
    """Run a command to its end."""
    return Command(module, words, ranks, environment).finish()


def walk(folder: Path, ranks: int, runs: list[list[str]], **environment: str) -> str:
    """Train the runs one after the other on so many ranks; returns what was printed."""
    plan = folder / f"runs_{ranks}.json"
    plan.write_text(json.dumps(runs))
    ended = run_command("tests.support.walk", plan, ranks=ranks, **environment)
    assert ended.code == 0, ended.said
    return ended.said


def torchrun(module: str, *words: str | Path, ranks: int, **environment: str) -> Ended:
    """Run a command to its end on new Pythons, which torch's launcher starts."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", module, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)
