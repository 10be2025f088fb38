"""The state of one training run: what it consists of, and how it goes into a checkpoint and back."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_scale.config import Config
from snell_scale.data.batches import steps_per_epoch
from snell_scale.engines.checkpoint import Checkpoint, Checkpoints
from snell_scale.instrument.divergence import DivergenceWatch
from snell_scale.instrument.flops import product_dtype, utilisation
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.instrument.snapshot import MemorySnapshot
from snell_scale.instrument.throughput import StepTimer
from snell_scale.interfaces import DataBundle, Engine, Ranks, Task, Tuner
from snell_scale.optimization import AveragedWeights, trainable_parameters
from snell_scale.progress import Progress
from snell_scale.records import NoWriter, StepWriter
from snell_scale.signals import StopVote


@dataclass
class Training:
    """Everything that one training run consists of while it runs, on this rank.

    best_weights: whole, on the host of rank 0; empty on the others.
    peak_bytes: of the measured step's memory, None before it: what a logged line tells who watches the run.
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
    writer: StepWriter | NoWriter
    checkpoints: Checkpoints
    timer: StepTimer
    probe: MemoryProbe
    progress: Progress
    stop_requested: StopVote
    averages: AveragedWeights | None = None
    watch: DivergenceWatch = field(default_factory=DivergenceWatch)
    history: "History" = field(default_factory=lambda: History())
    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    communication: dict[str, Any] | None = None
    flops: dict[str, int] | None = None
    peak_bytes: int | None = None
    snapshot: MemorySnapshot | None = None
    _started: float = field(default_factory=time.perf_counter)

    def measured(self) -> "History":
        """The history with this attempt's measurements; what this attempt has not measured stays."""
        throughput: dict[str, Any] = self.timer.report()
        if not throughput["num_timed_steps"]:
            throughput = self.history.throughput or throughput
        return History(
            seconds=self.history.seconds + time.perf_counter() - self._started,
            resumed_from=self.history.resumed_from,
            memory=self._memory(),
            throughput=throughput,
            communication=self.communication or self.history.communication,
            flops=self._flops(throughput.get("step_ms_median")),
        )

    def _memory(self) -> dict[str, Any]:
        """Of the attempt that measured a step; without one what is known, and no peak where nothing ran."""
        report, before = self.probe.report(), self.history.memory
        if "step" in report["phases"]:
            return report
        if before is not None and before["peak"]:
            return before
        return report if report["peak"]["phase"] != "load" else {**report, "peak": {}}

    def _flops(self, step_ms: float | None) -> dict[str, Any] | None:
        counted, engine = self.flops or self.history.flops, self.config.engine
        if counted is None:
            return None
        dtype = product_dtype(engine.precision, engine.frozen_dtype)
        return utilisation(counted, step_ms=step_ms, device=self.engine.device, dtype=dtype)


@dataclass(frozen=True)
class History:
    """What earlier attempts at this run took and measured; plain values, they travel in its checkpoints."""

    seconds: float = 0.0
    resumed_from: tuple[int, ...] = ()
    memory: dict[str, Any] | None = None
    throughput: dict[str, Any] = field(default_factory=dict)
    communication: dict[str, Any] | None = None
    flops: dict[str, Any] | None = None


def total_steps(config: Config, data: DataBundle) -> int:
    """Optimizer steps of the whole run."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None
    return max(1, round(config.training.epochs * steps_per_epoch(data.train, config.training.batch_size)))


def evaluation_interval(config: Config, data: DataBundle) -> int:
    """Optimizer steps between two evaluations."""
    if config.evaluation.every_steps is not None:
        return config.evaluation.every_steps
    assert config.evaluation.every_epochs is not None
    return max(1, round(config.evaluation.every_epochs * steps_per_epoch(data.train, config.training.batch_size)))


def save(run: Training) -> None:
    """A checkpoint with all that a resumed run needs to continue as if it had not stopped."""
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if run.engine.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(run.engine.device)
    common = {
        "engine": run.engine.state_dict(),
        "tuner": run.tuner.state_dict(),
        "best": {"value": run.best_value, "step": run.best_step, "weights": run.best_weights},
        "history": asdict(run.measured()),
    }
    write = run.engine.writer(_laid_out_as_parameters(run), staged=run.config.checkpoint.asynchronous)
    run.checkpoints.save(run.step, write, layout=run.engine.layout(), common=common, own={"rng": rng})


def restore(run: Training, checkpoint: Checkpoint) -> None:
    """Continue from what `save` wrote, on as many ranks or on another number of them."""
    run.engine.load(checkpoint.folder, _laid_out_as_parameters(run))
    common = checkpoint.common
    run.engine.load_state_dict(common["engine"])
    run.tuner.load_state_dict(common["tuner"])
    best = common["best"]
    run.step, run.best_value, run.best_step = checkpoint.step, best["value"], best["step"]
    run.best_weights = dict(best["weights"]) if run.engine.ranks.is_first else {}
    history = common["history"]
    resumed_from = (*history["resumed_from"], run.step)
    run.history = History(**(history | {"resumed_from": resumed_from}))
    if checkpoint.own is None:  # another number of ranks: their streams of random numbers have no continuation
        if run.engine.ranks.is_first:
            print("another number of ranks than before: dropout masks are drawn anew", file=sys.stderr)
        torch.manual_seed(rank_seed(run.config.seed, run.engine.ranks) + run.step)
        return
    torch.set_rng_state(checkpoint.own["rng"]["cpu"])
    if "cuda" in checkpoint.own["rng"]:
        torch.cuda.set_rng_state(checkpoint.own["rng"]["cuda"], run.engine.device)


def rank_seed(seed: int, ranks: Ranks) -> int:
    """Each rank draws dropout masks of its own; rank 0 draws those of a run on one rank."""
    return (seed + 1_000_003 * ranks.rank) % 2**63


def kept_names(module: nn.Module) -> list[str]:
    """What makes up a trained state: trainable parameters and all buffers."""
    return [name for name, _ in trainable_parameters(module)] + [name for name, _ in module.named_buffers()]


def _laid_out_as_parameters(run: Training) -> dict[str, Tensor]:
    averages = run.averages.tensors() if run.averages is not None else {}
    state = {f"average.{name}": tensor for name, tensor in averages.items()}
    return state | {f"tuner.{name}": tensor for name, tensor in run.tuner.sharded_state().items()}


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
