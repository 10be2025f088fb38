"""One training step on fake tensors, under the probe that also measures real ones."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snell_scale.estimate.cuda_dropout import dropout_of_a_gpu
from snell_scale.estimate.cuda_transients import triton_body_bytes
from snell_scale.estimate.fake_run import FakeRun
from snell_scale.estimate.gpu_autocast import autocast_of_a_gpu
from snell_scale.estimate.inputs import Inputs, batch_like
from snell_scale.estimate.module_watch import ModuleWatch
from snell_scale.estimate.settings import Target
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.interfaces import StepPlan
from snell_scale.optimizer_step import optimizer_step, unobserved


@dataclass(frozen=True)
class StepPeaks:
    """memory: as MemoryProbe reports it. place: the innermost module in which the peak stands; None: in none."""

    memory: dict[str, Any]
    place: str | None


def run_step(run: FakeRun, inputs: Inputs, plan: StepPlan, *, target: Target, evaluation_size: int) -> StepPeaks:
    """The peaks of a step that is not the first (the optimizer's state is there), and of an evaluation batch."""
    watch = ModuleWatch(run.bundle.module)
    on_gpu = target == "cuda"
    with run.mode, _as_on_a_gpu() if on_gpu else nullcontext():
        probe = MemoryProbe(
            run.tuner.module,
            partial(_optimizer_tensors, run),
            extra=run.engine.held,
            place=watch.place,
            body_bytes=triton_body_bytes if on_gpu else None,
        )
        run.tuner.begin_step(0, 0, False)
        optimizer_step(run, _microbatches(run, inputs, plan), phase=unobserved)
        with probe, watch:
            optimizer_step(run, _microbatches(run, inputs, plan), phase=probe.phase)
        with probe, probe.phase("evaluate"):
            _evaluate(run, inputs, evaluation_size)
    report = probe.report()
    runs_a_module = report["peak"]["phase"] != "step"
    return StepPeaks(report, probe.place_of_peak() if runs_a_module else None)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    with dropout_of_a_gpu(), autocast_of_a_gpu():
        yield


@torch.no_grad()
def _evaluate(run: FakeRun, inputs: Inputs, num_samples: int) -> None:
    """A forward with the loss stands for what tasks evaluate: their metrics read values, and add little."""
    run.tuner.module.eval()
    batch = batch_like(run.bundle, inputs, num_samples=num_samples)
    with run.engine.autocast():
        run.task(run.tuner.module, run.engine.move(batch))
    run.tuner.module.train()


def _microbatches(run: FakeRun, inputs: Inputs, plan: StepPlan) -> list[dict[str, Tensor]]:
    """Two stand for any number of them: from the second on there are gradients while a forward runs."""
    count = min(plan.gradient_accumulation, 2)
    return [batch_like(run.bundle, inputs, num_samples=plan.microbatch_size) for _ in range(count)]


def _optimizer_tensors(run: FakeRun) -> list[Tensor]:
    state = [value for entry in run.engine.optimizer.state.values() for value in entry.values()]
    averages = run.averages.tensors().values() if run.averages is not None else ()
    return [value for value in (*state, *run.tuner.tensors(), *averages) if isinstance(value, torch.Tensor)]
