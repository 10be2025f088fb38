"""torch's snapshot of the CUDA allocator: every block with the stack that allocated it, for its memory viewer."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Of each allocation the history keeps a few KB of stacks.
_MOST_EVENTS = 100_000
_FUNCTIONS = ("_record_memory_history", "_dump_snapshot")


class MemorySnapshot:
    """Writes memory_snapshot.pickle after the measured step, memory_snapshot-oom.pickle where memory runs out.

    After the measured step no stacks are recorded: of a later end the blocks are known, and those of before.

    pytorch.org/memory_viz shows it. Where there is no CUDA allocator, or a torch without these functions, which
    are private there, it says so once and does nothing.
    """

    def __init__(self, device: torch.device, folder: Path, *, rank: int = 0, world_size: int = 1) -> None:
        self._folder = folder
        self._rank = "" if world_size == 1 else f"-rank{rank}"
        self._device = device
        self._works = device.type == "cuda" and all(hasattr(torch.cuda.memory, each) for each in _FUNCTIONS)
        if not self._works and rank == 0:
            print(f"logging.memory_snapshot does nothing: {self._why_not()}", file=sys.stderr)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around a run: allocations are recorded until `take`. Where memory runs out inside, that is written."""
        if not self._works:
            yield
            return
        torch.cuda.memory._record_memory_history("all", max_entries=_MOST_EVENTS, device=self._device)
        try:
            yield
        except torch.OutOfMemoryError:
            # Here the frames that ran out of memory are still alive, and what they hold with them.
            self._dump("-oom")
            raise
        finally:
            torch.cuda.memory._record_memory_history(None)

    def take(self) -> None:
        """The measured step has ended: write what was recorded, and record no more, which would take time."""
        if self._works:
            self._dump()
            torch.cuda.memory._record_memory_history(None)

    def _dump(self, moment: str = "") -> None:
        path = self._folder / f"memory_snapshot{moment}{self._rank}.pickle"
        try:
            torch.cuda.memory._dump_snapshot(str(path))
        except OSError as error:  # it must not end a run, nor hide that memory ran out
            print(f"no memory snapshot: {error}", file=sys.stderr)

    def _why_not(self) -> str:
        if self._device.type != "cuda":
            return f"there is no CUDA allocator on {self._device.type}"
        return f"torch {torch.__version__} has no {', '.join(_FUNCTIONS)}"
