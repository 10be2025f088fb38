"""A run's steps.jsonl read as it grows: each line once."""

import json
import os
from pathlib import Path
from typing import Any


class StepsFile:
    """Reads what was added since the last time; from the start again where a continued run replaced the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._offset = 0

    def new_lines(self) -> tuple[list[dict[str, Any]], bool]:
        """(the lines added since the last call, whether they are the first of another file).

        A line that is not whole yet comes with a later call; a damaged one is left out.
        """
        try:
            file = self._path.open("rb")
        except OSError:
            return [], False
        with file:
            status = os.fstat(file.fileno())  # the path may lead to another file by now
            is_other = status.st_ino != self._inode or status.st_size < self._offset
            if is_other:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = [_line(text) for text in whole.splitlines()]
        return [line for line in lines if line is not None], is_other

    def written_at(self) -> float | None:
        """When the last line was written; None before there is a file."""
        try:
            return self._path.stat().st_mtime
        except OSError:
            return None


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
