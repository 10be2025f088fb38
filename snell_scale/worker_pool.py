"""Runs of a study in processes of their own, a few at a time, that stop cleanly and never outlive the study."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
# How long a stopped worker may take to save its checkpoint before it is killed.
_SECONDS_TO_SAVE = 60.0
_busy = threading.Event()


class WorkerPool(Generic[T, R]):
    """Calls `function(item)` in worker processes. A SIGINT or SIGTERM to the parent stops all of them.

    function: importable; its process gets SIGTERM to stop early. It then must end the process: a worker that
    returned would wait for more.
    """

    def __init__(self, function: Callable[[T], R], *, num_workers: int) -> None:
        self._function = function
        self._num_workers = num_workers

    def outcomes(self, items: Sequence[T]) -> Iterator[tuple[int, R | BaseException]]:
        """(index, result or exception) as calls end.

        A worker that dies takes its pool along; what had not ended is then called again, each call in a pool
        of its own, so that the one that kills its worker is known: its outcome is BrokenProcessPool.
        KeyboardInterrupt, raised here by either signal, comes after every worker has ended.
        """
        waiting = dict(enumerate(items))
        with sigterm_interrupts():
            for index, outcome in self._run(waiting, self._num_workers):
                if isinstance(outcome, BrokenProcessPool):
                    continue
                del waiting[index]
                yield index, outcome
            for index, item in waiting.items():
                yield from self._run({index: item}, 1)

    def _run(self, items: Mapping[int, T], num_workers: int) -> Iterator[tuple[int, R | BaseException]]:
        queue = list(items.items())
        threads = max(1, _num_cores() // num_workers)
        # spawn: a forked child would inherit torch's thread pools and CUDA state.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(threads,))
        running: dict[Future[R], int] = {}
        try:
            while queue or running:
                while queue and len(running) < num_workers:
                    index, item = queue.pop(0)
                    running[pool.submit(_call, self._function, item)] = index
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, error = running.pop(future), future.exception()
                    yield index, future.result() if error is None else error
                    if isinstance(error, BrokenProcessPool):
                        return
            pool.shutdown()
        except KeyboardInterrupt:
            _stop(pool)
            raise


def _stop(pool: ProcessPoolExecutor) -> None:
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    deadline = time.monotonic() + _SECONDS_TO_SAVE
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the main thread, as SIGINT does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start_worker(num_threads: int) -> None:
    """In the worker: its share of the cores, OMP_NUM_THREADS at most, and the end with the parent's."""
    import torch

    torch.set_num_threads(min(num_threads, torch.get_num_threads()))
    # A terminal's Ctrl-C reaches every process; the parent alone decides, and sends SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    while _busy.is_set():
        time.sleep(0.1)
    os._exit(1)


def _call(function: Callable[[T], R], item: T) -> R:
    _busy.set()
    try:
        return function(item)
    finally:
        _busy.clear()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
