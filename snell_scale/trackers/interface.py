"""What a tracker is; trackers.following calls it, in a thread of its own."""

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Receives a run's figures; it may raise anything, which ends the tracker and not the run."""

    def start(self, num_done_steps: int) -> None:
        """Training begins, or continues after so many steps: later figures of an earlier attempt are void."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """values: "<split>/<figure>" → value after `step` optimizer steps; "train" is a split."""

    def close(self, *, ok: bool) -> None:
        """The run has ended, well or not."""
