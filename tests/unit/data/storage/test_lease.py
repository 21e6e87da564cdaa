"""Leases: one owner at a time, on any machine, whatever ended the one before."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage import lease
from data.storage.lease import InUseError, Owner, is_held, take
from tests.support.paths import ROOT

OTHER_MACHINE = {"machine": "node7 boot pid", "host": "node7", "token": "other"}
HOLD = """
import sys, time
from pathlib import Path
from data.storage.lease import take
held = take(Path(sys.argv[1]), "wait")
print("held", flush=True)
time.sleep(60)
"""


def age(path: Path, seconds: float) -> None:
    """Let the last sign of life be so many seconds old."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def write(path: Path, **changed: object) -> Owner:
    """A lease of another process, which differs in these facts from this one."""
    owner = replace(Owner.here(), **{"token": "other", **changed})
    path.write_text(json.dumps(asdict(owner)))
    return owner


@contextmanager
def holder(path: Path) -> Generator[subprocess.Popen[str]]:
    """Another process of this machine that holds the lease."""
    words = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / lease.NAME


def test_a_second_owner_is_refused_at_once_and_told_of_the_first(path: Path) -> None:
    with holder(path) as process:
        age(path, 10 * lease.STALE_S)
        process.send_signal(signal.SIGSTOP)  # a process that stands still is alive, too
        with pytest.raises(InUseError) as refusal:
            take(path, "choose another run.name")
    line = str(refusal.value)
    assert line.startswith(f"{path.parent} is in use by ")
    assert f"(process {process.pid}), since 20" in line
    assert f"choose another run.name; if it has ended, remove {path}" in line
    assert "\n" not in line


def test_a_killed_owner_is_followed_at_once_with_a_line(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(path) as process:
        assert is_held(path)
        process.kill()
        process.wait()
    assert not is_held(path)
    with take(path, "wait"):
        assert is_held(path)
        (line,) = caplog.messages
        assert line.startswith(f"{path.parent}: taken over from ")
        assert f"(process {process.pid})" in line
    assert list(path.parent.iterdir()) == []


def test_a_pid_that_another_process_got_is_not_the_owner(path: Path) -> None:
    path.parent.mkdir()
    write(path, started="1")
    take(path, "wait").release()


def test_an_owner_on_another_machine_counts_as_gone_when_it_was_silent_for_long(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    write(path, **OTHER_MACHINE)
    age(path, lease.STALE_S - 30)
    with pytest.raises(InUseError, match="on node7"):
        take(path, "wait")
    age(path, lease.STALE_S + 30)
    with take(path, "wait"):
        assert "on node7" in caplog.messages[0]


@pytest.mark.parametrize(
    ("environment", "follows"),
    [
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}, True),
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "78", "SLURM_RESTART_COUNT": "2"}, False),
        ({"SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}, False),
        ({}, False),
    ],
)
def test_a_job_that_slurm_starts_again_follows_itself_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], follows: bool
) -> None:
    path.parent.mkdir()
    write(path, **OTHER_MACHINE, job="77", restart=1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if follows:
        take(path, "wait").release()
    else:
        with pytest.raises(InUseError, match="Slurm job 77"):
            take(path, "wait")


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=300)
    | st.recursive(st.none() | st.text(), st.lists).map(lambda value: json.dumps(value).encode())
)
def test_a_lease_of_any_bytes_refuses_while_it_is_new_and_gives_way_when_it_is_old(
    content: bytes,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, lease.NAME)
        path.write_bytes(content)
        with pytest.raises(InUseError, match="an unknown process"):
            take(path, "wait")
        age(path, lease.STALE_S + 30)
        take(path, "wait").release()
        assert not path.exists()


def test_the_words_of_a_lease_cannot_write_on_the_terminal(path: Path) -> None:
    path.parent.mkdir()
    write(path, **OTHER_MACHINE, command="\x1b[2J\n" + 3000 * "x")
    with pytest.raises(InUseError) as refusal:
        take(path, "wait")
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 1000


def test_of_many_that_find_a_stale_lease_one_gets_it(path: Path) -> None:
    path.parent.mkdir()
    held = []

    def try_it(number: int) -> None:
        with suppress(InUseError):
            held.append(take(path, "wait"))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            write(path, started="1")
            list(pool.map(try_it, range(8)))
            (winner,) = held
            winner.release()
            held.clear()


def wait_until(reached: threading.Event) -> None:
    assert reached.wait(20)


def test_the_heart_beats_and_writes_the_lease_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.005)
    with take(path, "wait"):
        content = path.read_bytes()
        age(path, 1000)
        while time.time() - path.stat().st_mtime > 500:
            time.sleep(0.005)
        path.unlink()
        while not path.exists() or path.read_bytes() != content:
            time.sleep(0.005)


def test_an_owner_that_lost_its_lease_is_told_and_leaves_the_new_one_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.005)
    lines: list[str] = []
    told = threading.Event()

    def lost(line: str) -> None:
        lines.append(line)
        told.set()

    with take(path, "wait", lost):
        follower = write(path, **OTHER_MACHINE)
        wait_until(told)
    assert lines == [f"{path.parent} was taken over by {follower}: this process ends"]
    assert json.loads(path.read_text())["token"] == "other"


def test_a_fork_does_not_end_the_lease_of_its_parent(path: Path) -> None:
    with take(path, "wait") as held:
        child = os.fork()
        if child == 0:
            held.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert path.exists()


def test_a_full_disk_leaves_no_empty_lease(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        take(path, "wait")
    assert list(path.parent.iterdir()) == []
