"""A process that saves without end is killed at random instants; what it leaves must always be readable.

Run by `python checkpoint_kill.py FOLDER KILLS`: the savers are forks of this process, so that a kill costs
milliseconds and not the imports. Prints how many saves and kills there were; a failed check is a traceback.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from snell_scale.engines.checkpoint import Checkpoint, Checkpoints
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.shards import read_shards, shard_writer

_MODES = ("sync", "async", "replace")
"""replace: every save replaces the only checkpoint there is."""
_LONGEST_SECONDS = 0.15  # a save takes 10 to 60 ms: kills fall into every part of the first few
_REPLACED_STEP = 7


def main(folder: Path, num_kills: int) -> None:
    torch.set_num_threads(1)
    print(json.dumps({mode: _kill_often(folder / mode, mode, num_kills) for mode in _MODES}))


def _kill_often(root: Path, mode: str, num_kills: int) -> dict[str, int]:
    generator = random.Random(0)
    _save(_checkpoints(root, mode), 0, mode)
    last, num_partial, num_saves = 0, 0, 0
    for _ in range(num_kills):
        told = _kill_a_saver(root, mode, start=last + 1, seconds=generator.uniform(0, _LONGEST_SECONDS))
        num_partial += any(root.glob(".step-*.partial"))
        found = _checkpoints(root, mode).newest()
        assert found is not None, f"nothing is left after {told} of {mode}"
        number = _read(found)
        assert number in (told, told + 1), f"found save {number}, the last that was told is {told}"
        num_saves += number - last
        last = number
    return {"saves": num_saves, "kills_inside_a_save": num_partial}


def _kill_a_saver(root: Path, mode: str, *, start: int, seconds: float) -> int:
    """The number of the last save that had returned when the kill came."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        checkpoints = _checkpoints(root, mode)
        number = start
        while True:
            os.write(writer, f"{number - 1}\n".encode())
            _save(checkpoints, number, mode)
            number += 1
    os.close(writer)
    first = os.read(reader, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader) as told:
        return int((first.decode() + told.read()).split()[-1])


def _checkpoints(root: Path, mode: str) -> Checkpoints:
    return Checkpoints(root, Ranks(), keep_last=1 if mode == "replace" else 2, asynchronous=mode == "async")


def _save(checkpoints: Checkpoints, number: int, mode: str) -> None:
    value = torch.full((40_000,), float(number))
    checkpoints.save(
        _REPLACED_STEP if mode == "replace" else number,
        shard_writer({"value": value}, staged=mode == "async"),
        layout={"world_size": 1},
        common={"number": number},
        own={"number": number},
    )
    checkpoints.wait()


def _read(found: Checkpoint) -> int:
    """The number of the save, after every part of it has been found to be of the same one."""
    value = torch.zeros(40_000)
    read_shards(found.folder, {"value": value}, Ranks())
    own: dict[str, Any] = found.own or {}
    numbers = {found.common["number"], own["number"], *value.unique().int().tolist()}
    assert len(numbers) == 1, f"parts of several saves in {found.folder}: {numbers}"
    return numbers.pop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
