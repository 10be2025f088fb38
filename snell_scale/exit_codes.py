"""How a process says how its run ended: in its exit code, and to a launcher that takes it for a crash."""

import os
from pathlib import Path

from snell_scale.records import write_atomically

EXIT_CODES = {"ok": 0, "failed": 1, "oom": 3, "diverged": 4, "interrupted": 75}
REFUSED = 2  # bad input, or a disk that is full or not writable: what the user has to mend


class OtherRankFailed(RuntimeError):
    """What was raised here is no more than the echo of what happened on another rank, which exits with this."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def tell_launcher(code: int) -> int:
    """The code to exit with: `code`, or 0 where SNELL_SCALE_EXIT_FILE is set and `code` is written there.

    torchrun restarts a group of which one rank did not exit with 0. Only a crash is worth that: what ran out of
    memory, diverged, was stopped or was refused ends the same way again.
    """
    told = os.environ.get("SNELL_SCALE_EXIT_FILE")
    if told is None or code == EXIT_CODES["failed"]:
        return code
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write_atomically(Path(told), f"{code}\n".encode())
    return 0
