"""Reading every sample of a data set once, before training: which of them cannot be used, and how far it is."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_CHUNK = 512

Entry = TypeVar("Entry")


def problems_of(
    entries: Sequence[Entry], problem: Callable[[Entry], str | None], progress: "ReadingProgress"
) -> list[str | None]:
    """For each entry None, or why it cannot be used. In threads: decoding an image lets others run."""
    found: list[str | None] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(entries), _CHUNK):
            chunk = entries[first : first + _CHUNK]
            found += pool.map(problem, chunk)
            progress.advance(len(chunk))
    progress.lines += [f"left out: {message}" for message in found if message]
    return found


def is_first_rank() -> bool:
    """Whether this process speaks for all; data are read before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


class ReadingProgress:
    """How many were read, on rank 0's stderr: one line that changes, or a line per tenth in a file."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._speaks = is_first_rank()
        self._is_terminal = sys.stderr.isatty()
        self.lines: list[str] = []

    def advance(self, count: int) -> None:
        before, self._done = self._done, self._done + count
        tenth = 10 * before // self._total != 10 * self._done // self._total
        if self._speaks and (self._is_terminal or tenth):
            end = "\r" if self._is_terminal else "\n"
            print(
                f"reading every image once: {self._done} of {self._total}", end=end, file=sys.stderr, flush=True
            )

    def close(self) -> None:
        """What was left out, and how much of all that is."""
        if self._speaks:
            summary = f"{len(self.lines)} of {self._total} images cannot be used and are left out"
            print("\n" * self._is_terminal + "\n".join([*self.lines, summary]), file=sys.stderr)
