"""One optimizer step: forward and backward over the microbatches, then one update."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from snell_scale.interfaces import Batch, Engine, Task, Tuner
from snell_scale.optimization import AveragedWeights

Phase: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""Name → what is open while that part of a step runs."""


class StepParts(Protocol):
    """What a step is made of; forward: what it calls, the module itself or what an engine wrapped it in."""

    @property
    def engine(self) -> Engine: ...

    @property
    def tuner(self) -> Tuner: ...

    @property
    def task(self) -> Task: ...

    @property
    def forward(self) -> nn.Module: ...

    @property
    def averages(self) -> AveragedWeights | None: ...


def unobserved(_: str) -> AbstractContextManager[None]:
    """The phase of a step that nobody measures."""
    return contextlib.nullcontext()


def optimizer_step(parts: StepParts, microbatches: list[Batch], *, phase: Phase) -> tuple[Tensor, Tensor]:
    """Train on the microbatches; returns (this rank's mean loss, gradient norms)."""
    engine, losses = parts.engine, []
    for number, batch in enumerate(microbatches, start=1):
        engine.ranks.beat()
        with engine.microbatch(is_last=number == len(microbatches)):
            with phase("forward"):
                on_device = engine.move(batch)
                with engine.autocast():
                    loss = parts.task(parts.forward, on_device)["loss"] / len(microbatches)
            with phase("backward"):
                engine.backward(loss)
        losses.append(loss.detach())
    with phase("step"):
        norms = engine.step()
        parts.tuner.end_step()
        engine.zero_grad()
        if parts.averages is not None:
            parts.averages.update()
    return torch.stack(losses).sum(), norms
