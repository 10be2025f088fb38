"""Ends a rank that would wait for ever: for one that failed, one that hangs, or one that is gone.

gloo raises where a peer's process ends, NCCL waits, and a peer that hangs ends nothing. So two threads of every
rank look after it: one talks through the store, and may be stuck there; the other decides, and ends the process.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from snell_scale.engines.ranks import Ranks
from snell_scale.exit_codes import EXIT_CODES, tell_launcher
from snell_scale.interfaces import Failure

_INTERVAL_SECONDS = 1.0
# From a failure of another rank until this one is ended: enough to come out of a collective and write a record.
_GRACE_SECONDS = 10.0
# For what a rank still does before it is ended; a disk or a store that hangs must not keep it.
_LAST_WORDS_SECONDS = 5.0


@contextmanager
def watched(ranks: Ranks, *, timeout_seconds: float) -> Iterator[Callable[[], None]]:
    """While this thread is in the block: end the process after a failure, or without any rank's beat for so long.

    What it yields is called before a rank may leave for good, which the others would take for a failure.

    A failure that a rank told leaves the thread `_GRACE_SECONDS` to come out of the block by itself. A process
    that is ended has called `ranks.before_end` on rank 0, and exits with the failure's code.
    """
    if ranks.world_size == 1:
        yield lambda: None
        return
    watchdog = _Watchdog(ranks, timeout_seconds)
    talking = threading.Thread(target=watchdog.talk, daemon=True)
    watching = threading.Thread(target=watchdog.watch, daemon=True)
    talking.start()
    watching.start()

    def stop_talking() -> None:
        # A thread that comes back from the store into an interpreter that is being taken down aborts it.
        watchdog.silent.set()
        talking.join(_LAST_WORDS_SECONDS)

    try:
        yield stop_talking
    finally:
        stop_talking()
        watchdog.over.set()
        watching.join(_LAST_WORDS_SECONDS)


class _Report(NamedTuple):
    """number: tells a new one from one that was read before."""

    number: int
    num_beats: int
    where: str


class _Watchdog:
    """Two loops, each for a thread of its own, until `silent` or `over`; the first hears, the second acts."""

    def __init__(self, ranks: Ranks, timeout_seconds: float) -> None:
        self.silent = threading.Event()
        self.over = threading.Event()
        self._ranks = ranks
        self._timeout_seconds = timeout_seconds
        # Reports are read from the second interval of quiet on, and three without news are silence.
        self._interval = min(_INTERVAL_SECONDS, timeout_seconds / 8)
        self._thread = threading.get_ident()
        self._failure: Failure | None = None
        self._quiet_seconds = 0.0
        # What each rank last said of itself, and when that was heard.
        self._reports: dict[int, tuple[_Report, float]] = {}
        self._beats_heard = 0

    def talk(self) -> None:
        """Say how far this rank is, hear how far the others are, until something failed."""
        number = 0
        while self._failure is None and not self.silent.is_set():
            number += 1
            report = _Report(number, self._ranks.num_beats, self._describe_self())
            answered = self._ranks.tell_report(json.dumps(report))
            self._failure = self._ranks.failure() or (None if answered else self._store_is_gone())
            if self._quiet_seconds > 0:  # else nobody asks how the others are: the store has better to do
                self._read_reports()
            self.silent.wait(self._interval)

    def watch(self) -> None:
        """End the process where the job has failed or stands still."""
        beats, before = self._beats(), time.monotonic()
        while not self.over.wait(self._interval):
            now = time.monotonic()
            # A batch system may suspend a job for hours: time in which this thread stood still does not count.
            self._quiet_seconds += min(now - before, 2 * self._interval)
            before = now
            if self._beats() != beats:
                beats, self._quiet_seconds = self._beats(), 0.0
            if self._quiet_seconds > self._timeout_seconds:
                self._end_of_hanging()
            elif self._failure is not None:
                self._end(self._failure, grace_seconds=_GRACE_SECONDS)

    def _end_of_hanging(self) -> None:
        frame = self._frame()
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        text = f"rank {self._ranks.rank} stands still here:\n{stack}"
        _within(_LAST_WORDS_SECONDS, partial(print, text, file=sys.stderr, flush=True))
        failure = Failure(self._ranks.rank, "failed", self._describe_hanging(), EXIT_CODES["failed"])
        _within(_LAST_WORDS_SECONDS, partial(self._ranks.tell_failure, failure))
        self._end(failure, grace_seconds=0.0)

    def _end(self, failure: Failure, *, grace_seconds: float) -> None:
        """Unless the thread that is watched leaves the block by itself."""
        if self.over.wait(grace_seconds):
            return
        text = f"rank {self._ranks.rank} is ended; rank {failure.rank}: {failure.status}: {failure.message}"
        _within(_LAST_WORDS_SECONDS, partial(print, text, file=sys.stderr, flush=True))
        if self._ranks.is_first:
            _within(_LAST_WORDS_SECONDS, partial(self._ranks.before_end, failure))
        _within(_LAST_WORDS_SECONDS, sys.stdout.flush)
        code = failure.exit_code
        with suppress(OSError):
            code = tell_launcher(code)
        os._exit(code)

    def _beats(self) -> tuple[int, int]:
        """Of this rank, and of all as far as they were heard: while one makes progress the others wait for it."""
        return self._ranks.num_beats, self._beats_heard

    def _read_reports(self) -> None:
        now = time.monotonic()
        for rank, report in self._ranks.reports().items():
            told = _Report(*json.loads(report))
            if rank not in self._reports or self._reports[rank][0] != told:
                self._reports[rank] = told, now
        self._beats_heard = sum(report.num_beats for report, _ in self._reports.values())

    def _store_is_gone(self) -> Failure:
        message = "its process, or the launcher through which the ranks tell each other how they are, is gone"
        return Failure(0, "failed", message, EXIT_CODES["failed"])

    def _describe_self(self) -> str:
        frame = self._frame()
        where = ""
        if frame is not None:
            path = Path(frame.f_code.co_filename)
            where = f", in {frame.f_code.co_name} ({path.parent.name}/{path.name}:{frame.f_lineno})"
        return f"at step {self._ranks.step}{where}"

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._thread)

    def _describe_hanging(self) -> str:
        now = time.monotonic()
        lines = []
        for rank in range(self._ranks.world_size):
            if rank == self._ranks.rank:
                lines.append(f"rank {rank} is {self._describe_self()}")
            elif rank not in self._reports:
                lines.append(f"rank {rank} gave no sign of life: frozen or gone")
            else:
                report, heard = self._reports[rank]
                # The reports come every interval; two may be late on a busy machine.
                silent = now - heard > 3 * self._interval
                end = f" (no sign of life for {now - heard:.0f} s: frozen or gone)" if silent else ""
                lines.append(f"rank {rank} {'was' if silent else 'is'} {report.where}{end}")
        return (
            f"no progress for {self._timeout_seconds:g} s (engine.timeout_seconds): {'; '.join(lines)}. If such "
            "a pause is to be expected (compilation, a large save), raise engine.timeout_seconds; otherwise look "
            "at the rank that waits for none of the others. --resume auto continues from the newest checkpoint"
        )


def _within(seconds: float, function: Callable[[], None]) -> None:
    """Call it in a thread of its own, and wait for it at most so long."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
