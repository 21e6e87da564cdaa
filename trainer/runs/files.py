"""The one writer of a run's small files: records that are appended, and whole files beside them.

A training does not wait for these files, and no disk ends it. A thread writes them, each file in
order. A file that cannot be written is tried again after growing waits (trainer/runs/outages.py).
Until then its records wait in memory, at most WAITING_BYTES of them; checkpoints take along the
lines that wait. Beyond the bound the oldest whole files are dropped first, then new records, and
both are counted as lost.
"""

import atexit
import errno
import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.storage.atomic import append_lines, write_atomic
from data.storage.documents import DocumentError, is_json_object, parse_json
from data.storage.untrusted import read_file
from trainer.runs.events import event_line
from trainer.runs.outages import Outages, free_space, retry_delays
from trainer.runs.paths import HISTORY

WAITING_BYTES = 64 * 2**20
"""Bound of the records and files that wait in memory."""
MAX_BYTES = 2**33
"""Largest file of records that is read."""
CHUNK_LINES = 256
"""Lines of one append: a disk with little room takes some of many."""
IDLE_S = 2.0
"""Seconds without a job after which the writing thread ends."""
CLOSE_S = 10.0
"""Longest wait of `close` for a disk that is slow, beside its patience with one that fails."""
SLOW_S = 1.0
"""Longest wait of a save for lines that are on their way to the disk."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A line to append, or another action on the file."""

    act: Callable[[], None] | None = None
    line: str = ""
    size: int = 0
    then: Callable[[], None] | None = None


@dataclass(slots=True)
class _File:
    """The jobs of one path, in order."""

    jobs: deque[_Job] = field(default_factory=deque[_Job])
    delays: Callable[[], float] = field(default_factory=retry_delays)
    due_s: float = 0.0
    failed: bool = False


class RunFiles:
    """The small files of a run folder; rank 0 alone writes them.

    writes: whether this process is rank 0; in any other, no method does anything. All methods
    return at once, except `unwritten`, `flush` and `close`.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self._writes = folder, writes
        self.outages = Outages(self.note)
        self.lost = 0
        """Records and files that were dropped because WAITING_BYTES were waiting."""
        self._files: dict[Path, _File] = {}
        self._waiting = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        if writes:
            atexit.register(self.close)  # an error may end the process without `close`

    def append(self, name: str, line: str) -> None:
        """Append a line to a file of the run folder."""
        self._add(self.folder / name, _Job(line=line, size=len(line) + 1))

    def note(self, event: str, **details: Any) -> None:
        """Append an event to the run's history, history.jsonl; details: JSON values."""
        self.append(HISTORY, event_line(event, **details))

    def replace(self, path: Path, payload: bytes, then: Callable[[], None] | None = None) -> None:
        """Write a whole file in the place of an old one, and of one that still waits.

        then: called in the writer's thread after the file is written.
        """

        def act() -> None:
            if not self.folder.is_dir():  # a disk that is away must not be written under its name
                raise FileNotFoundError(errno.ENOENT, "the run folder is missing", str(self.folder))
            write_atomic(path, payload)

        with self._changed:
            file = self._files.setdefault(path, _File())
            self._drop(file, [job for job in file.jobs if job.size and job.act])
        self._add(path, _Job(act=act, size=len(payload), then=then))

    def rewrite(self, name: str, act: Callable[[Path], None], keeps: Callable[[str], bool]) -> None:
        """Change a file of records: `act` may raise OSError, and is tried again then.

        keeps: whether a line that still waits stays; the others are dropped at once.
        """
        path = self.folder / name
        with self._changed:
            file = self._files.setdefault(path, _File())
            self._drop(file, [job for job in file.jobs if job.line and not keeps(job.line)])
        self._add(path, _Job(act=lambda: act(path)))

    def mend(self, name: str) -> None:
        """Take out lines that are no JSON: a killed process can leave half a line."""
        self.rewrite(name, lambda path: change_lines(path, _whole), lambda line: True)

    def restore(self, unwritten: Mapping[str, Sequence[str]]) -> None:
        """Append the lines that a checkpoint took along and that no file has; see `unwritten`."""
        for name, lines in unwritten.items():
            present: set[str] = set()
            with suppress(OSError):
                present.update(read_lines(self.folder / name))
            for line in lines:
                if line not in present:
                    self.append(name, line)

    def unwritten(self) -> dict[str, list[str]]:
        """Return the lines that wait, by the name of their file; a checkpoint takes them along.

        Lines on their way to a disk that works get SLOW_S to arrive.
        """
        self.flush(SLOW_S, past_failures=False)
        with self._changed:
            lines = {
                path.name: [job.line for job in file.jobs if job.line]
                for path, file in self._files.items()
            }
        return {name: waiting for name, waiting in lines.items() if waiting}

    def flush(self, timeout_s: float, *, past_failures: bool = True) -> bool:
        """Wait until everything is written; return whether it is.

        past_failures: whether to wait for files that could not be written, too.
        """

        def done() -> bool:
            waits = (file for file in self._files.values() if file.jobs)
            return all(file.failed and not past_failures for file in waits)

        with self._changed:
            return self._changed.wait_for(done, timeout_s)

    def close(self, patience_s: float = 0.0) -> str:
        """Write what waits, for at most `patience_s` if a disk fails, and end the thread.

        Returns the files that are incomplete in words, and prints them; empty if all are whole.
        """
        with self._changed:
            self._closing = True
            for file in self._files.values():
                file.due_s, file.failed = 0.0, False  # one more attempt
            self._changed.notify_all()
        self.flush(CLOSE_S, past_failures=False)
        self.flush(patience_s)
        atexit.unregister(self.close)
        with self._changed:
            left = [str(path) for path, file in self._files.items() if file.jobs]
            for file in self._files.values():  # the thread ends
                self._drop(file, list(file.jobs))
            self._changed.notify_all()
        lost = [f"{self.lost} records and files that memory could not hold"] if self.lost else []
        incomplete = ", ".join(left + lost)
        if incomplete:
            print(
                f"error: not written: {incomplete}; {free_space(self.folder)}: make room and start "
                "again, the last checkpoint has the lines",
                file=sys.stderr,
                flush=True,
            )
        return incomplete

    def _add(self, path: Path, job: _Job) -> None:
        if not self._writes:
            return
        with self._changed:
            if not self._make_room(job.size):
                self.lost += 1
                return
            file = self._files.setdefault(path, _File())
            file.jobs.append(job)
            self._waiting += job.size
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="run-files", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _make_room(self, size: int) -> bool:
        """Drop whole files until `size` bytes fit into the bound; return whether they do."""
        for file in self._files.values():
            while self._waiting + size > WAITING_BYTES:
                whole = next((job for job in file.jobs if job.act and job.size), None)
                if whole is None:
                    break
                self._drop(file, [whole])
                self.lost += 1
        return self._waiting + size <= WAITING_BYTES

    def _drop(self, file: _File, jobs: Sequence[_Job]) -> None:
        """Take jobs out of a file's queue, unless they are out of it already."""
        for job in jobs:
            if job in file.jobs:
                file.jobs.remove(job)
                self._waiting -= job.size

    def _work(self) -> None:
        """Write files, in a thread, until there has been no job for IDLE_S, or `close`."""
        while (found := self._next()) is not None:
            path, file, jobs = found
            try:
                _write(path, jobs)
            except OSError as error:
                with self._changed:
                    delay_s = min(file.delays(), SLOW_S) if self._closing else file.delays()
                    file.failed, file.due_s = True, time.monotonic() + delay_s
                    count = sum(len(one.jobs) for one in self._files.values())
                    self._changed.notify_all()
                more = f"the run goes on, and {count} records and files wait in memory"
                self.outages.failed(path, error, more)
                continue
            self.outages.written(path)
            for job in jobs:
                if job.then is not None:
                    job.then()
            with self._changed:  # last: what the two above add is written before `close` returns
                self._drop(file, jobs)
                file.failed, file.delays = False, retry_delays()
                self._changed.notify_all()

    def _next(self) -> tuple[Path, _File, list[_Job]] | None:
        """Wait for a job that is due; None where the thread has to end."""
        idle = False
        with self._changed:
            while True:
                now_s = time.monotonic()
                waits = [(file.due_s, path) for path, file in self._files.items() if file.jobs]
                due_s, path = min(waits, default=(0.0, None))
                if path is None and (self._closing or idle):
                    self._thread = None  # `_add` starts another one
                    return None
                if path is None or due_s > now_s:
                    wait_s = IDLE_S if path is None else due_s - now_s
                    idle = not self._changed.wait(wait_s)
                    continue
                file = self._files[path]
                if file.jobs[0].line:
                    lines = itertools.takewhile(lambda job: job.line, file.jobs)
                    return path, file, list(itertools.islice(lines, CHUNK_LINES))
                return path, file, [file.jobs[0]]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file of records; none if it is missing.

    Bytes that are no UTF-8 become lone surrogates, which `append_lines` writes as the same bytes.
    Raises: OSError if the file cannot be read.
    """
    return _split(_read(path))


def change_lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Replace the lines of a file of records by `change(lines)`, at once.

    Raises: OSError if the file cannot be read or written; it is unchanged then.
    """
    before = _read(path)
    after = "".join(f"{line}\n" for line in change(_split(before)))
    payload = after.encode(errors="surrogateescape")
    if payload != before:
        write_atomic(path, payload)


def _read(path: Path) -> bytes:
    try:
        return read_file(path, limit=MAX_BYTES)
    except FileNotFoundError:
        return b""


def _split(content: bytes) -> list[str]:
    return [line for line in content.decode(errors="surrogateescape").split("\n") if line]


def _whole(lines: list[str]) -> list[str]:
    return [line for line in lines if parse_record(line)]


def parse_record(line: str) -> dict[str, Any]:
    """Parse a line of a file of records; empty if it is torn or damaged."""
    try:
        values: object = parse_json(line)
    except DocumentError:
        return {}
    return values if is_json_object(values) else {}


def _write(path: Path, jobs: Sequence[_Job]) -> None:
    act = jobs[0].act
    if act is not None:
        act()
    else:
        append_lines(path, [job.line for job in jobs])
