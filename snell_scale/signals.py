"""SIGTERM, SIGUSR2 (SLURM's warning) and SIGINT as a request that the training loop answers between two steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from snell_scale.interfaces import Ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Called, it says whether a stop was requested. A second SIGINT is not caught: it stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def set(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class StopVote:
    """Called once before every step, it says the same on all ranks: whether any of them was asked to stop.

    Each vote is counted while a step runs, so that no rank waits for it; it is known one step later.
    """

    def __init__(self, flag: Callable[[], bool], ranks: Ranks) -> None:
        self._flag = flag
        self._ranks = ranks
        self._counted: Callable[[], int] | None = None

    def __call__(self) -> bool:
        if self._ranks.world_size == 1:
            return self._flag()
        last, self._counted = self._counted, self._ranks.start_maximum(int(self._flag()))
        return last is not None and bool(last())

    def close(self) -> None:
        """Wait for the vote under way."""
        if self._counted is not None:
            self._counted()
            self._counted = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """While the block runs, the signals set the flag (in the main thread; elsewhere nothing does)."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.set) for number in _SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
