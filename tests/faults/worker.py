"""One rank of `snell-scale run`, in a process that has everything imported, with a fault at one of its steps."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import sklearn.datasets
import torch
from torch import nn

from snell_scale import cli, registry
from snell_scale.engines import checkpoint, watchdog
from snell_scale.engines.ddp import DdpEngine
from snell_scale.interfaces import Batch, StepOutput
from snell_scale.run import run
from snell_scale.tasks.classification import Classification
from tests.spawned import set_rank

# Imported once, for all ranks that are forked from here.
IMPORTED = (
    sklearn.datasets,
    run,
    DdpEngine,
    *(registry.config_class(kind, name) for kind in ("model", "method", "data") for name in registry.names(kind)),
    import_module("timm"),  # after those that make torchvision importable on the CPU
)


class Fault(NamedTuple):
    """What happens on `rank` in the forward of its `step` (the first is 1)."""

    name: str
    rank: int
    step: int = 4


def work(
    rank_of: tuple[int, int], port: int, arguments: Sequence[str], faults: Sequence[Fault], log: Path
) -> None:
    """`snell-scale ARGUMENTS` as one rank of so many; what it prints goes into `log`."""
    rank, world_size = rank_of
    set_rank(rank, world_size, port)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for fault in faults:
        if fault.rank == rank:
            _at_step(fault.step, _FAULTS[fault.name])
    sys.argv = ["snell-scale", *arguments]
    cli.main()


def _at_step(step: int, act: Callable[[StepOutput], StepOutput]) -> None:
    original, count = Classification.__call__, 0

    def counted(self: Classification, model: nn.Module, batch: Batch) -> StepOutput:
        nonlocal count
        count += 1
        output = original(self, model, batch)
        return act(output) if count == step else output

    Classification.__call__ = counted


def _sleep(output: StepOutput) -> StepOutput:
    time.sleep(600)
    return output


def _signalled(number: signal.Signals) -> Callable[[StepOutput], StepOutput]:
    def act(output: StepOutput) -> StepOutput:
        os.kill(os.getpid(), number)
        return output

    return act


def _out_of_memory(output: StepOutput) -> StepOutput:
    torch.empty(2**62, dtype=torch.uint8)
    return output


def _not_finite(output: StepOutput) -> StepOutput:
    return StepOutput(loss=output["loss"] * float("nan"), outputs=output["outputs"])


def _bug(output: StepOutput) -> StepOutput:
    raise KeyError("a bug")


def _refuse(output: StepOutput) -> StepOutput:
    raise ValueError("a bad value")


def _disk_full(output: StepOutput) -> StepOutput:
    """For our own files, and for those that DeepSpeed writes with torch.save."""

    def full(path: Path, content: memoryview) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def full_too(content: Any, file: Any, **settings: Any) -> None:
        if isinstance(file, str | Path):
            full(Path(file), memoryview(b"half of it"))
        save(content, file, **settings)

    save, torch.save = torch.save, full_too
    checkpoint._write_file = full
    return output


def _deaf(output: StepOutput) -> StepOutput:
    """As a rank waits in NCCL, where a peer's end is not noticed; it is given a second to notice."""
    watchdog._GRACE_SECONDS = 1.0
    return _sleep(output)


_FAULTS: dict[str, Callable[[StepOutput], StepOutput]] = {
    "sleep": _sleep,
    "stop": _signalled(signal.SIGSTOP),
    "kill": _signalled(signal.SIGKILL),
    "terminate": _signalled(signal.SIGTERM),
    "warn": _signalled(signal.SIGUSR2),
    "out of memory": _out_of_memory,
    "not finite": _not_finite,
    "bug": _bug,
    "refuse": _refuse,
    "disk full": _disk_full,
    "deaf": _deaf,
}
