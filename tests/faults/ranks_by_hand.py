"""Runs on several ranks, started by hand: rank 0 hosts the store, as under SLURM and deepspeed."""

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.faults.worker import Fault, work
from tests.spawned import free_ports


class Ended(NamedTuple):
    """How a run ended: exit codes (negative: by that signal; None: it had to be killed) and output, by rank."""

    codes: list[int | None]
    output: list[str]
    seconds: float


class RanksByHand:
    """`snell-scale ARGUMENTS` on processes that were started at the same time."""

    def __init__(
        self, arguments: Sequence[str], faults: Sequence[Fault], *, logs: Path, world_size: int = 2
    ) -> None:
        (port,) = free_ports(1)
        self._logs = [Path(f"{logs}-rank-{rank}.log") for rank in range(world_size)]
        self._started = time.monotonic()
        self._processes: list[BaseProcess] = [
            _context().Process(target=work, args=((rank, world_size), port, tuple(arguments), tuple(faults), log))
            for rank, log in enumerate(self._logs)
        ]
        for process in self._processes:
            process.start()

    def wait_until_stopped(self, *, within_seconds: float) -> None:
        """Until every process was stopped by a signal."""
        deadline = self._started + within_seconds
        while any(psutil.Process(p.pid).status() != psutil.STATUS_STOPPED for p in self._processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """To every process."""
        for process in self._processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def end(self, *, within_seconds: float, may_remain: int | None = None) -> Ended:
        """Wait until all have ended; kills what is left. may_remain: a rank that is not waited for."""
        deadline = self._started + within_seconds
        for rank, process in enumerate(self._processes):
            if rank != may_remain:
                process.join(max(0.0, deadline - time.monotonic()))
        seconds = time.monotonic() - self._started
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
            process.join()
        return Ended(codes, [log.read_text() for log in self._logs], seconds)


def _context() -> ForkServerContext:
    """Processes forked from one that has imported torch and us, and has done nothing with them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.worker"])
    return context
