"""A lease: one process at a time owns a folder, on any node; a crash of the owner ends it.

The lease is a file that names its owner. It is created exclusively (O_EXCL, in NFS from version 3
on), and a thread of the owner sets its time every BEAT_S. Ages are differences between times of the
file server, so the clocks of nodes do not matter.

The next process takes over, with a line in the log, where the owner is gone: its process no longer
runs on this machine, Slurm has started its job again, or its file is older than STALE_S. Where the
owner is alive, the next process is refused at once.
"""

import contextlib
import getpass
import json
import logging
import os
import secrets
import socket
import stat
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from data.storage.documents import DocumentError, parse_json
from data.text import printable

NAME = ".lease"
"""Name of the lease inside of the folder that it protects."""
BEAT_S = 15.0
"""Interval in which an owner shows that it is alive, in seconds."""
STALE_S = 120.0
"""Age of a lease, in seconds, from which its owner on another machine counts as gone."""
GUARD_S = 0.02
"""Pause while another process removes a lease, in seconds."""
MAX_BYTES = 4096
"""Largest size of a lease that is read."""
MAX_SHOWN = 320
"""[characters] Longest name of an owner that is printed."""

_log = logging.getLogger(__name__)


class InUseError(ValueError):
    """Another process owns the folder; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process that holds a lease."""

    token: str
    """Random word, another one for each lease."""
    command: str
    user: str
    host: str
    machine: str
    """Host, boot and namespace in which `pid` is a number."""
    pid: int
    started: str
    """Start of the process in clock ticks since boot: pids are used again."""
    job: str
    """Slurm's job, with the array task; empty outside of Slurm."""
    restart: int
    """Number of times that Slurm has put the job back into the queue."""
    since: str

    @classmethod
    def here(cls) -> Self:
        """Describe this process."""
        environment, host, pid = os.environ, socket.gethostname(), os.getpid()
        array = environment.get("SLURM_ARRAY_JOB_ID")
        task = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID')}" if array else ""
        return cls(
            token=secrets.token_hex(8),
            command=_command(),
            user=_user(),
            host=host,
            machine=_machine(host),
            pid=pid,
            started=_start_of(pid) or "",
            job=task or environment.get("SLURM_JOB_ID", ""),
            restart=_number(environment.get("SLURM_RESTART_COUNT")),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    def is_gone(self, age_s: float) -> bool:
        """Return whether this owner has ended; age_s: seconds since it showed that it is alive."""
        me = Owner.here()
        if self.machine == me.machine:
            return _start_of(self.pid) != self.started
        requeued = bool(self.job) and self.job == me.job and self.restart < me.restart
        return requeued or age_s > STALE_S

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        text = f"{self.command} of {self.user} on {self.host} (process {self.pid}{job})"
        return printable(f"{text}, since {self.since}", MAX_SHOWN)


class Lease:
    """A lease that this process holds: until `release`, or the end of a `with` block or process."""

    def __init__(self, path: Path, owner: Owner, lost: Callable[[str], None]) -> None:
        ended = threading.Event()
        self.release = weakref.finalize(self, _release, path, owner, ended)
        beat = threading.Thread(
            target=_beat, args=(path, owner, ended, lost), name=f"lease of {path}", daemon=True
        )
        beat.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def end_process(line: str) -> None:
    """End this process at once: another one has taken over its folder."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(1)


def take(path: Path, remedy: str, lost: Callable[[str], None] = end_process) -> Lease:
    """Take the lease at `path`; make its folder if it is missing.

    remedy: what a user does about a refusal, in words. lost: called with a line of text if another
    process takes over while this one still runs, for example after it was suspended.
    Raises: InUseError where another process holds the lease; OSError where it cannot be written.
    """
    owner = Owner.here()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            _create(path, owner)
        except FileExistsError:
            _clear(path, remedy)
        else:
            return Lease(path, owner, lost)


def is_held(path: Path) -> bool:
    """Return whether an owner that is alive holds the lease at `path`."""
    found = _read(path)
    return found is not None and not _is_over(*found)


def refuse_if_held(path: Path, remedy: str) -> None:
    """Raise InUseError if an owner that is alive holds the lease; remedy: as in `take`."""
    found = _read(path)
    if found is not None and not _is_over(*found):
        raise InUseError(
            f"{path.parent} is in use by {found[0] or 'an unknown process'}: wait for its end, or "
            f"{remedy}; if it has ended, remove {path}"
        )


def _create(path: Path, owner: Owner) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(handle, json.dumps(asdict(owner)).encode())
    except OSError:  # the disk is full: without its content the file would only be in the way
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _clear(path: Path, remedy: str) -> None:
    """Remove a lease whose owner is gone. Raises: InUseError if it is alive."""
    refuse_if_held(path, remedy)
    guard = path.with_name(f"{path.name}.lock")  # one process at a time judges and removes
    try:
        os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if _now(path.parent) - guard.stat().st_mtime > STALE_S:
                guard.unlink()
        time.sleep(GUARD_S)
        return
    try:
        found = _read(path)
        if found is not None and _is_over(*found):
            path.unlink()
            gone = found[0] or "an unknown process"
            _log.warning("%s: taken over from %s, which has ended", path.parent, gone)
    finally:
        guard.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Owner | None, float] | None:
    """Return a lease's owner, None if the content is damaged, and its age in seconds.

    Returns None if there is no lease. Opening a file renews NFS's cache of its time.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:  # a link, or a file of another user
        return None, _now(path.parent) - path.lstat().st_mtime
    try:
        found = os.fstat(handle)
        text = os.read(handle, MAX_BYTES) if stat.S_ISREG(found.st_mode) else b""
    finally:
        os.close(handle)
    return _parse(text), _now(path.parent) - found.st_mtime


def _parse(text: bytes) -> Owner | None:
    try:
        values = parse_json(text, limit=MAX_BYTES)
        if all(type(values[field.name]) is field.type for field in fields(Owner)):
            return Owner(**{field.name: values[field.name] for field in fields(Owner)})
    except (DocumentError, KeyError, TypeError):
        pass
    return None


def _is_over(holder: Owner | None, age_s: float) -> bool:
    return age_s > STALE_S if holder is None else holder.is_gone(age_s)


def _now(folder: Path) -> float:
    """Return the time of the folder's file server; this machine's where it is read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()


def _beat(path: Path, owner: Owner, ended: threading.Event, lost: Callable[[str], None]) -> None:
    """Renew the time of the lease until `ended`, and write it again if somebody removed it."""
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):  # the disk is away for a while
            found = _read(path)
            if found is None:
                _create(path, owner)
            elif found[0] is not None and found[0].token != owner.token:
                lost(f"{path.parent} was taken over by {found[0]}: this process ends")
                return
            else:
                os.utime(path)


def _release(path: Path, owner: Owner, ended: threading.Event) -> None:
    ended.set()
    if os.getpid() != owner.pid:  # a fork
        return
    with contextlib.suppress(OSError):
        found = _read(path)
        if found is not None and found[0] == owner:
            path.unlink()


def _command() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return f"python -m {name}" if spec else name or "python"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container often has no name for its user
        return str(os.getuid())


def _machine(host: str) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{host} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return host


def _start_of(pid: int) -> str | None:
    """Return the start of a running process in clock ticks; None if it does not run."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    words = stat_line.rpartition(")")[2].split()
    return None if words[0] in "ZX" else words[19]


def _number(word: str | None) -> int:
    return int(word) if word and word.isdecimal() else 0
