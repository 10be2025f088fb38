"""A stop requested in the middle of training, as a batch system or a terminal does."""

import os
import signal

import pytest
from torch import Tensor

from snell_scale.engines.single import SingleEngine


def stop_in_step(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """The signal comes to this process in that step of its next run."""
    original, count = SingleEngine.step, 0

    def signalled(self: SingleEngine) -> Tensor:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(SingleEngine, "step", signalled)
