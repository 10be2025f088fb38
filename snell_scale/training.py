"""The state of one training run: what it consists of, and what of it goes into a checkpoint and back."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_scale.config import Config
from snell_scale.data.batches import steps_per_epoch
from snell_scale.instrument.divergence import DivergenceWatch
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.instrument.throughput import StepTimer
from snell_scale.interfaces import DataBundle, Engine, Task, Tuner
from snell_scale.optimization import AveragedWeights, trainable_parameters
from snell_scale.progress import Progress
from snell_scale.records import StepWriter


@dataclass
class Training:
    """Everything that one training run consists of while it runs.

    forward is what a training step calls: `model` itself or its compiled form, sharing its parameters.
    """

    config: Config
    engine: Engine
    tuner: Tuner
    model: nn.Module
    forward: nn.Module
    task: Task
    data: DataBundle
    folder: Path
    writer: StepWriter
    timer: StepTimer
    probe: MemoryProbe
    progress: Progress
    stop_requested: Callable[[], bool]
    averages: AveragedWeights | None = None
    watch: DivergenceWatch = field(default_factory=DivergenceWatch)
    history: "History" = field(default_factory=lambda: History())
    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)

    def measured(self) -> "History":
        """The history with this attempt's measurements; what this attempt has not measured stays."""
        report, throughput = self.probe.report(), self.timer.report()
        return History(
            seconds=self.history.seconds + time.perf_counter() - self._started,
            resumed_from=self.history.resumed_from,
            memory=report if "step" in report["phases"] else self.history.memory,
            throughput=throughput if throughput["num_timed_steps"] else self.history.throughput,
        )


@dataclass(frozen=True)
class History:
    """What earlier attempts at this run took and measured; plain values, they travel in its checkpoints."""

    seconds: float = 0.0
    resumed_from: tuple[int, ...] = ()
    memory: dict[str, Any] | None = None
    throughput: dict[str, Any] = field(default_factory=dict)


def total_steps(config: Config, data: DataBundle) -> int:
    """Optimizer steps of the whole run."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None
    return max(1, round(config.training.epochs * steps_per_epoch(data.train, config.training.batch_size)))


def checkpoint_state(run: Training) -> dict[str, Any]:
    """All that a resumed run needs to continue as if it had not stopped: tensors and plain values only."""
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if run.engine.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(run.engine.device)
    return {
        "step": run.step,
        "weights": trained_state(run.model),
        "engine": run.engine.state_dict(),
        "tuner": run.tuner.state_dict(),
        "averages": run.averages.state_dict() if run.averages else None,
        "best": {"value": run.best_value, "step": run.best_step, "weights": run.best_weights},
        "rng": rng,
        "history": asdict(run.measured()),
    }


def restore(run: Training, state: Mapping[str, Any]) -> None:
    """The inverse of `checkpoint_state`."""
    load_trained_state(run.model, state["weights"])
    run.engine.load_state_dict(state["engine"])
    run.tuner.load_state_dict(state["tuner"])
    if run.averages is not None:
        run.averages.load_state_dict(state["averages"])
    best = state["best"]
    run.step, run.best_value, run.best_step = state["step"], best["value"], best["step"]
    run.best_weights = dict(best["weights"])
    history = state["history"]
    resumed_from = (*history["resumed_from"], run.step)
    run.history = History(**(history | {"resumed_from": resumed_from}))
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"], run.engine.device)


@torch.no_grad()
def load_trained_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy saved trainable parameters and buffers into `module`, in place."""
    live = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in state.items():
        live[name].copy_(tensor)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and all buffers by name; they share memory with the module."""
    trained = {name: p.detach() for name, p in trainable_parameters(module)}
    return trained | {name: b.detach() for name, b in module.named_buffers()}


@contextlib.contextmanager
def averaged(run: Training) -> Iterator[None]:
    """The averaged weights in place of the live ones, where the run keeps averages."""
    if run.averages is None:
        yield
        return
    run.averages.swap()
    try:
        yield
    finally:
        run.averages.swap()
