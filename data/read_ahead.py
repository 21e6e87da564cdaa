"""Answers to requests, in their order and a few in advance: by threads, or by processes."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Request = TypeVar("Request")
Answer = TypeVar("Answer")


def with_thread(
    answer: Callable[[Request], Answer],
    requests: Iterator[Request],
    *,
    depth: int,
    threads: int = 1,
) -> Generator[Answer, None, None]:
    """Answer up to `depth` requests ahead in one thread or more, which end with the generator."""
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
    """Answer about `depth` requests ahead in forked processes, which end with the generator.

    Args:
        answer: Called in the workers.
        requests: Without end; drawn in this process.
        workers: Processes.
        depth: Requests ahead, at least one a worker.

    Raises:
        ValueError, OSError: what `answer` raised.
        ChildProcessError: a worker died.
    """
    loader = DataLoader(
        _Answers(answer),
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(1, -(-depth // workers)),
        collate_fn=lambda result: result,
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
        del results  # ends the workers now; an error's trace would keep them


@contextmanager
def _watched(processes: Collection[BaseProcess]) -> Iterator[None]:
    """Raise in this block, and only here, when one of some processes has died.

    DataLoader would raise from a signal handler, wherever the main thread happens to be. In other
    threads it looks by itself, every few seconds.
    """

    def check(*_: object) -> None:
        if any(process.exitcode is not None for process in processes):
            raise ChildProcessError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, check)
    try:
        check()
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


class _Answers(Dataset[Answer | Exception], Generic[Request, Answer]):
    """The map from requests to answers that DataLoader wants.

    Errors are handed over as they are: DataLoader would bury their one line under a trace.
    """

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self._answer = answer

    def __getitem__(self, request: Request) -> Answer | Exception:
        try:
            return self._answer(request)
        except (ValueError, OSError) as error:
            return error
