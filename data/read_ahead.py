"""Answer requests ahead of time, in threads or in processes, and yield the answers in order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from data.child_process import end_with_parent

Request = TypeVar("Request")
Answer = TypeVar("Answer")


def with_thread(
    answer: Callable[[Request], Answer],
    requests: Iterator[Request],
    *,
    depth: int,
    threads: int = 1,
) -> Generator[Answer, None, None]:
    """Yield the answers to requests in order; threads compute up to `depth` of them ahead.

    answer: called in the threads; its errors are raised here. The threads end with the generator.
    """
    with ThreadPoolExecutor(threads, "read-ahead") as pool:
        pending: deque[Future[Answer]] = deque()
        try:
            for request in requests:
                pending.append(pool.submit(answer, request))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def with_processes(
    answer: Callable[[Request], Answer], requests: Iterator[Request], *, workers: int, depth: int
) -> Generator[Answer, None, None]:
    """Yield the answers to requests in order; forked processes compute about `depth` of them ahead.

    answer: called in the processes. requests: drawn in this process, without end. depth: at least
    one request for each process is computed ahead. The processes end with the generator, and with
    this process however it ends.
    Raises: ValueError or OSError where `answer` raises one; ChildProcessError where a process dies.
    """
    loader = DataLoader(
        _Answers(answer),
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(1, -(-depth // workers)),
        collate_fn=_unchanged,
        worker_init_fn=partial(_begin, os.getpid(), _in_main_thread()),
        multiprocessing_context="fork",  # workers inherit `answer` instead of unpickling it
        generator=torch.Generator(),  # otherwise the loader draws from torch's global state
    )
    others = active_children()
    with _watched(()):
        results = iter(loader)
    processes = [process for process in active_children() if process not in others]
    try:
        while True:
            try:
                with _watched(processes):
                    result = next(results)
            except (RuntimeError, OSError, EOFError) as error:
                raise ChildProcessError(
                    f"data.workers: one of {workers} decoding processes died, perhaps for lack of "
                    "memory; fewer workers or a smaller data.prefetch need less"
                ) from error
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        del results  # ends the workers now; an error's traceback would keep them alive


def _begin(parent: int, with_main_thread: bool, number: int) -> None:
    """Begin a worker of process `parent`, whose main thread may have started it."""
    for signal_number in (signal.SIGTERM, signal.SIGUSR1):
        if callable(signal.getsignal(signal_number)):  # inherited: it is the parent that stops
            signal.signal(signal_number, signal.SIG_IGN)
    if with_main_thread:  # another thread may end before its process; DataLoader then looks itself
        end_with_parent(parent)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _unchanged(answer: object) -> object:
    return answer


@contextmanager
def _watched(processes: Collection[BaseProcess]) -> Generator[None, None, None]:
    """Raise ChildProcessError within the block when one of the processes dies.

    DataLoader's own signal handler would raise anywhere in the main thread. In other threads
    DataLoader polls its processes every few seconds; this block then does nothing.
    """

    def check(*_: object) -> None:
        if any(process.exitcode is not None for process in processes):
            raise ChildProcessError

    if not _in_main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, check)
    try:
        check()
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


class _Answers(Dataset[Answer | Exception], Generic[Request, Answer]):
    """Map requests to answers, in the form of a data set for DataLoader.

    Errors are returned, because DataLoader would add a traceback to the message of a raised one.
    """

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self._answer = answer

    def __getitem__(self, request: Request) -> Answer | Exception:
        try:
            return self._answer(request)
        except (ValueError, OSError) as error:
            return error
