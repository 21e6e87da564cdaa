"""Trainings on a disk that fails in every way, killed again and again.

python -m tests.support.disk_faults FOLDER FAULTS SEED OVERRIDES…: each life of the training is
forked from one process that has imported everything, and trains the run in FOLDER/run. While it
lives, faults are made from outside: no file can grow (a full disk, by RLIMIT_FSIZE), a file of
records or a folder is away. It is killed a random time after its start. Between the lives the
newest checkpoint is damaged or removed, the last line of the records torn, and links and foreign
files are laid into the run folder. The last life ends by itself, after a last fault in it.
FOLDER/undisturbed is the same training without faults. Prints one JSON line: the number of faults
by kind, and of the lives.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch

from trainer.cli import load_config
from trainer.config import Config
from trainer.runs.paths import CHECKPOINTS, checkpoints_in, step_name
from trainer.runtime.steady import steady_output
from trainer.train.loop import fit

PATIENCE_S = 120.0
"""For a life to begin or to end; only one that hangs takes that long."""
LONGEST_LIFE_S = 1.0
LONGEST_FAULT_S = 0.4
FOREVER = 10**6
LAST_STEPS = 60
"""Of the last life, which ends by itself."""
forks = multiprocessing.get_context("fork")


def steps(count: int) -> str:
    return f"train.max_steps={count}"


def live(config: Config, log: Path) -> None:
    """One life: train, with everything that is said in a file on the same disk."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    steady_output()
    code = fit(config)
    sys.stdout.flush()
    os._exit(code)


class Campaign:
    """Faults of one run, drawn from a seed."""

    def __init__(self, folder: Path, overrides: Sequence[str], seed: int) -> None:
        self.run, self.folder, self.overrides = folder / "run", folder, overrides
        self.draws = random.Random(seed)
        self.made: Counter[str] = Counter()
        self.skipped = 0
        """Damaged checkpoints of which the history tells."""
        self.lives = 0

    def start(self, last_step: int) -> BaseProcess:
        """Begin a life."""
        self.lives += 1
        return train(self.run, self.folder / "log.txt", [*self.overrides, steps(last_step)])

    def began(self, process: BaseProcess) -> None:
        """Wait until a life is about to train."""
        log = self.folder / "log.txt"
        before = log.stat().st_size if self.lives > 1 else 0

        def said() -> bool:
            return log.exists() and b"preflight: 1 rank" in log.read_bytes()[before:]

        wait_for(process, said, "a life begins")

    def told(self, process: BaseProcess, name: str) -> None:
        """Wait until the history tells that checkpoint `name` was skipped."""
        history = self.run / "history.jsonl"

        def written() -> bool:
            return history.exists() and f"{name}" in history.read_text(errors="replace")

        wait_for(process, written, f"the history tells of {name}")
        self.skipped += 1

    def disturb(self, process: BaseProcess) -> None:
        """Make one fault of a disk while a life trains."""
        faults: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
            "full": lambda: self._full(process, 0),
            "nearly full": lambda: self._full(process, self._size() + self.draws.randrange(1, 200)),
            "records away": lambda: _away(process, self.run / "metrics.jsonl"),
            "history away": lambda: _away(process, self.run / "history.jsonl"),
            "checkpoints away": lambda: _away(process, self.run / CHECKPOINTS),
        }
        kind = self.draws.choice(list(faults))
        with faults[kind]():
            self.made[kind] += 1
            time.sleep(self.draws.uniform(0.02, LONGEST_FAULT_S))

    def block_records(self, process: BaseProcess) -> None:
        """Take the file of records away until the training says that it cannot write it."""
        log = self.folder / "log.txt"
        before = log.stat().st_size

        def said() -> bool:
            return b"metrics.jsonl cannot be written" in log.read_bytes()[before:]

        with _away(process, self.run / "metrics.jsonl"):
            self.made["records away"] += 1
            wait_for(process, said, "a failed attempt")

    def damage(self) -> str:
        """Damage what lies there between two lives; return the checkpoint that is damaged."""
        kind = self.draws.choice(["torn line", "bad byte", "altered", "removed", "link", "foreign"])
        self.made[kind] += 1
        (self.run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)  # a life may end before
        newest = next(reversed(checkpoints_in(self.run / CHECKPOINTS).values()), None)
        if kind in ("torn line", "bad byte"):
            for name in ("metrics.jsonl", "history.jsonl"):
                with (self.run / name).open("ab") as file:
                    file.write(b'{"step": 3, "tra' if kind == "torn line" else b"\xff\xfe{}\n")
        elif kind == "foreign" or newest is None:
            self._lay_foreign_files()
        elif kind == "link":
            elsewhere = self.folder / f"elsewhere_{self.made.total()}"
            newest.rename(elsewhere)
            newest.symlink_to(elsewhere)
        elif kind == "removed":
            shutil.rmtree(newest) if not newest.is_symlink() else newest.unlink()
        else:
            files = [path for path in sorted(newest.iterdir()) if path.stat().st_size]
            self._alter(self.draws.choice(files))
            return newest.name
        return ""

    def kill(self, process: BaseProcess) -> None:
        """End a life at once."""
        process.kill()
        process.join()
        self.made["kill"] += 1

    def _size(self) -> int:
        log = self.run / "metrics.jsonl"
        return log.stat().st_size if log.is_file() else 0

    @contextmanager
    def _full(self, process: BaseProcess, limit: int) -> Generator[None]:
        """Let no file of a process grow beyond `limit` bytes."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (limit, before[1]))
        yield
        with contextlib.suppress(ProcessLookupError):  # a life may end by itself
            resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, before)

    def _alter(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[self.draws.randrange(len(content))] ^= 1 << self.draws.randrange(8)
        path.write_bytes(content[: self.draws.choice([len(content), len(content) // 2])])

    def _lay_foreign_files(self) -> None:
        folder, next_step = self.run / CHECKPOINTS, self.draws.randrange(1, 500)
        for name in (f"._{step_name(2)}", f"{step_name(2)}_backup", "notes"):
            (folder / name).mkdir(exist_ok=True)
        for name, target in ((step_name(next_step), "nowhere"), (f".{step_name(next_step)}", "")):
            path = folder / name
            if not os.path.lexists(path):
                path.symlink_to(self.folder / target)


@contextmanager
def _away(process: BaseProcess, path: Path) -> Generator[None]:
    """Move a file or folder away, with something of the other kind in its place."""
    hidden = path.with_name(f"away_{path.name}")
    is_folder = path.is_dir()
    with _frozen(process):
        there = path.exists()
        if there:
            path.rename(hidden)
            path.touch() if is_folder else path.mkdir()
    yield
    with _frozen(process):
        if there:
            path.unlink() if is_folder else path.rmdir()
            hidden.rename(path)


@contextmanager
def _frozen(process: BaseProcess) -> Generator[None]:
    """Stop a process for a change that it must see as one."""
    body = psutil.Process(process.pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        body.suspend()
    yield
    with contextlib.suppress(psutil.NoSuchProcess):
        body.resume()


def wait_for(process: BaseProcess, happened: Callable[[], bool], what: str) -> None:
    """Return once it has happened; raises RuntimeError where the life ended, or hangs, before."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not happened():
        if time.monotonic() > deadline_s or process.exitcode is not None:
            raise RuntimeError(f"{what}: did not happen; exit code {process.exitcode}")
        time.sleep(0.005)


def train(folder: Path, log: Path, overrides: Sequence[str]) -> BaseProcess:
    """Begin a life of the training in a folder."""
    config = load_config([*overrides, f"run.dir={folder}"])
    process = forks.Process(target=live, args=(config, log))
    process.start()
    return process


def main() -> int:
    folder, faults, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    overrides = sys.argv[4:]
    torch.set_num_threads(1)
    campaign = Campaign(folder, overrides, seed)
    draws, damaged = campaign.draws, ""
    while campaign.made.total() < faults:
        process = campaign.start(FOREVER)
        if draws.random() < 0.2:  # in the start
            time.sleep(draws.uniform(0, LONGEST_LIFE_S))
        else:
            campaign.began(process)
            if damaged:
                campaign.told(process, damaged)
            for _ in range(draws.randrange(2, 6)):
                time.sleep(draws.uniform(0, LONGEST_FAULT_S))
                campaign.disturb(process)
        campaign.kill(process)
        found = [campaign.damage() for _ in range(draws.randrange(1, 4))]
        damaged = found[-1]  # the newest one that is left
    newest = max(checkpoints_in(folder / "run" / CHECKPOINTS), default=0)
    last_step = newest + LAST_STEPS
    last = campaign.start(last_step)
    campaign.began(last)
    campaign.block_records(last)
    alone = train(folder / "undisturbed", folder / "alone.txt", [*overrides, steps(last_step)])
    for process in (last, alone):
        process.join()
        assert process.exitcode == 0, process.exitcode
    figures = {"lives": campaign.lives, "skipped": campaign.skipped, "steps": last_step}
    print(json.dumps({"faults": campaign.made, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
