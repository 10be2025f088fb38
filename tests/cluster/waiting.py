"""Waiting for other processes, never forever."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Return when the condition holds; fail where it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
        time.sleep(0.1)
