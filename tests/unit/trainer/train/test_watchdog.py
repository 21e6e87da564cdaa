"""Time limits of the phases of a run, on a clock that the tests turn, and the files of stacks."""

import faulthandler
import io
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.config import WatchdogConfig
from trainer.runtime.launcher import HANG_EXIT_CODE
from trainer.runtime.ranks import Ranks, T
from trainer.train import watchdog as module
from trainer.train.watchdog import Watchdog, write_stacks

LIMITS = WatchdogConfig(step_timeout_s=2.0, pause_timeout_s=10.0)
UNLIMITED = WatchdogConfig(step_timeout_s=0.0, pause_timeout_s=0.0)
PATIENCE_S = 60.0
"""For a thread to run at all; only a broken one takes that long."""
START = "20260101_000000"


class Alone(Ranks):
    """One rank, whose start has a name that the tests know."""

    def gather(self, value: T) -> list[T]:
        assert isinstance(value, str)
        return [type(value)(START)]


class Watched:
    """A watchdog whose time passes only in `let_pass`, and that never ends the process.

    This object stands in for the module `time`.
    """

    def __init__(self, limits: WatchdogConfig, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.codes: list[int] = []
        """The exit codes with which it wanted to end the process."""
        self._now_s, self._looks = 0.0, 0
        self._looked = threading.Condition()
        self._thread: threading.Thread | None = None
        patch.setattr(module, "time", self)
        patch.setattr(module, "POLL_S", 0.001)
        patch.setattr(os, "_exit", self._exit)
        before = set(threading.enumerate())
        self.watchdog = Watchdog(limits, folder, Alone(0, 1, torch.device("cpu")))
        (self._thread,) = set(threading.enumerate()) - before

    def begin(self, phase: str, step: int = 3) -> None:
        if phase == "training":
            self.watchdog.step(step)
        else:
            self.watchdog.pause(phase, step)
        self.let_pass(0.0)  # the watchdog has then read the new phase

    def let_pass(self, seconds: float) -> None:
        """Turn the clock on, and return once the watchdog has looked at it or has given up."""
        with self._looked:
            self._now_s += seconds
            wanted = self._looks + 2  # at the second look, all that the first one led to is done
            seen = self._looked.wait_for(lambda: self._looks >= wanted or self.codes, PATIENCE_S)
            assert seen

    def end(self) -> None:
        self.watchdog.close()
        assert self._thread is not None
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def monotonic(self) -> float:
        with self._looked:
            self._looks += threading.current_thread() is self._thread
            self._looked.notify_all()
            return self._now_s

    def _exit(self, code: int) -> None:
        with self._looked:
            self.codes.append(code)
            self._looked.notify_all()
        self.watchdog.close()  # ends the thread


@pytest.mark.parametrize(
    ("phase", "limits", "seconds"),
    [
        ("evaluation", LIMITS, 9.9),
        ("training", LIMITS, 1.9),
        ("evaluation", UNLIMITED, 1e9),
        ("training", UNLIMITED, 1e9),
    ],
)
def test_a_phase_within_its_limit_goes_on(
    phase: str,
    limits: WatchdogConfig,
    seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(limits, tmp_path, monkeypatch)
    for step in range(3):  # each phase has the whole of its limit
        watched.begin(phase, step)
        watched.let_pass(seconds)
    watched.end()
    assert watched.codes == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("phase", "seconds"), [("evaluation", 11.0), ("saving", 11.0), ("training", 3.0)]
)
def test_a_phase_beyond_its_limit_ends_the_job_and_leaves_the_stacks(
    phase: str,
    seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched = Watched(LIMITS, tmp_path, monkeypatch)
    watched.begin(phase)
    watched.let_pass(seconds)
    watched.end()
    assert watched.codes == [HANG_EXIT_CODE]
    (stack,) = tmp_path.glob(f"stacks/{START}/rank_00000.txt")
    assert f"{phase}, step 3, for {seconds:.0f} s" in stack.read_text()
    assert "let_pass" in stack.read_text()  # the main thread was there
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {phase} at step 3 took over {seconds:.0f} s")
    assert "watchdog.pause_timeout_s" in error


def test_the_start_of_a_run_has_the_limit_of_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(LIMITS, tmp_path, monkeypatch)
    watched.let_pass(9.9)
    assert watched.codes == []
    watched.let_pass(0.2)
    watched.end()
    assert watched.codes == [HANG_EXIT_CODE]


def test_after_half_its_limit_a_rank_follows_another_that_has_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(LIMITS, tmp_path, monkeypatch)
    watched.let_pass(5.1)
    watched.begin("evaluation")
    (tmp_path / "stacks" / START).mkdir(parents=True)  # the other rank's first act
    watched.let_pass(4.9)
    assert watched.codes == []
    watched.let_pass(0.2)
    watched.end()
    assert watched.codes == [HANG_EXIT_CODE]


def test_a_stack_file_names_the_rank_and_the_lines_of_its_threads(tmp_path: Path) -> None:
    path = tmp_path / "stacks" / "rank_00000.txt"
    write_stacks(path, "rank 0 of 1\n")
    text = path.read_text()
    assert text.startswith("rank 0 of 1\n")
    assert 'test_watchdog.py"' in text


def test_the_file_of_a_rank_appears_after_all_that_the_rank_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end when they see the file, and their end ends this rank too."""
    path, said = tmp_path / "stacks" / "rank_00000.txt", io.StringIO()

    def write(text: str) -> int:
        assert not path.exists()
        return said.write(text)

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=write, flush=lambda: None))
    write_stacks(path, "rank 0 of 1\n", "error: the job hangs\n")
    assert said.getvalue() == path.read_text() + "error: the job hangs\n"


def test_the_main_thread_is_among_any_number_of_threads(tmp_path: Path) -> None:
    path, ended = tmp_path / "rank_00000.txt", threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(120)]
    for thread in threads:
        thread.start()
    write_stacks(path, "rank 0 of 1\n")
    ended.set()
    for thread in threads:
        thread.join()
    assert 'test_watchdog.py"' in path.read_text()


def test_a_failure_in_the_middle_keeps_the_old_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rank_00000.txt"
    path.write_text("old")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(faulthandler, "dump_traceback", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_stacks(path, "rank 0 of 1\n")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
