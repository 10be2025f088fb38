"""The training loop: one optimizer step after another, with evaluation, records, checkpoints, a clean stop."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from snell_scale.data.batches import StepBatches, evaluation_share, training_batches
from snell_scale.instrument.communication import CommunicationCounter
from snell_scale.instrument.divergence import Divergence
from snell_scale.instrument.flops import FlopCounter
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.interfaces import Batch
from snell_scale.metrics import is_better
from snell_scale.optimization import learning_rate
from snell_scale.optimizer_step import Phase, optimizer_step, unobserved
from snell_scale.pictures import write_pictures
from snell_scale.training import Training, averaged, evaluation_interval, kept_names, save, total_steps


@dataclass(frozen=True)
class Outcome:
    """How training ended: after the last step, at a signal, or with a loss that is not finite."""

    interrupted: bool = False
    divergence: Divergence | None = None


def train(run: Training) -> Outcome:
    """Train `run` from `run.step` to its last step; its best weights are then in `run.best_weights`."""
    total = total_steps(run.config, run.data)
    training, logging = run.config.training, run.config.logging
    measured_step = run.step + min(logging.memory_at_step or 0, total - run.step)
    interval = evaluation_interval(run.config, run.data)
    batches = _batches(run)
    run.progress.start(total, done=run.step)
    while run.step < total:
        run.engine.ranks.beat(run.step)
        if run.stop_requested():
            save(run)
            return Outcome(interrupted=True)
        with run.timer.waiting_for_data():
            step, epoch, is_epoch_start, microbatches = next(batches)
        started = time.perf_counter()
        figures = run.tuner.begin_step(step, epoch, is_epoch_start)
        lr = _set_learning_rate(run, step, total)

        measured = step + 1 == measured_step
        run.timer.start()
        with _instruments(run, measured=measured) as phase:
            own_loss, norms = optimizer_step(run, microbatches, phase=phase)
        loss = run.engine.mean(own_loss)
        run.timer.stop(training.batch_size, timed=not measured)
        run.probe.allocator.observe()
        if measured and run.snapshot is not None:
            run.snapshot.take()
        run.step = step + 1
        run.watch.observe(run.step, loss, norms, norms_matter=not run.engine.skips_steps)

        logs = run.step % logging.every_steps == 0 or run.step == total or bool(figures)
        evaluates = run.step % interval == 0 or run.step == total
        saves = run.step == total or _is_multiple(run.step, run.config.checkpoint.every_steps)
        # Reading the watch is a host sync on a GPU: only where the step's figures are read anyway.
        if logs or evaluates or saves or run.engine.device.type == "cpu":
            divergence = run.watch.read(run.engine.norm_names, run.model)
            if divergence is not None:
                return Outcome(divergence=divergence)
        if logs:
            _log(run, epoch, loss, norms, lr, time.perf_counter() - started, figures)
        if evaluates:
            _evaluate_and_keep_best(run)
        if saves:
            save(run)
    return Outcome()


def evaluate(run: Training, split: Dataset[Batch]) -> dict[str, float]:
    """The task's metrics on a whole split, every sample counted once; averaged weights where there are some."""
    was_training = run.model.training
    run.model.eval()
    with run.probe.allocator.leaving_out(), averaged(run), torch.no_grad(), run.engine.autocast():
        evaluation = run.task.evaluation(run.model, split)
        for batch, counts in _share(run, split):
            run.engine.ranks.beat(run.step)
            evaluation.add(run.model, run.engine.move(batch), counts=counts)
    run.model.train(was_training)
    return evaluation.metrics(run.engine.sum(evaluation.sums()))


def show(run: Training, split: Dataset[Batch], *, prefix: str = "") -> None:
    """Write the task's pictures of the split into the run's folder; averaged weights where there are some."""
    was_training = run.model.training
    run.model.eval()
    with run.probe.allocator.leaving_out(), averaged(run), torch.no_grad(), run.engine.autocast():
        pictures = run.task.pictures(run.model, split)
    run.model.train(was_training)
    run.engine.ranks.first(lambda: write_pictures(run.folder / "pictures", pictures, prefix=prefix))


def _batches(run: Training) -> Iterator[StepBatches]:
    """The rest of the run's batches, from its next step on: this rank's share of each."""
    training, ranks = run.config.training, run.engine.ranks
    return training_batches(
        run.data.train,
        batch_size=training.batch_size,
        seed=run.config.seed,
        start_step=run.step,
        gradient_accumulation=training.gradient_accumulation,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=training.num_workers,
    )


def _share(run: Training, split: Dataset[Batch]) -> Iterator[tuple[Batch, bool]]:
    ranks = run.engine.ranks
    size, num_workers = run.config.evaluation.batch_size, run.config.training.num_workers
    return evaluation_share(split, size, rank=ranks.rank, world_size=ranks.world_size, num_workers=num_workers)


@contextlib.contextmanager
def _instruments(run: Training, *, measured: bool) -> Iterator[Phase]:
    """Around the measured step its memory, what its collectives carry and its FLOPs; around others nothing."""
    if not measured:
        yield unobserved
        return
    with run.probe, _counting_communication(run), FlopCounter() as flops:
        yield partial(_phase, run.probe, flops)
    run.peak_bytes = run.probe.report()["peak"]["total_bytes"]
    if not run.config.training.compile:  # what compiled code computes is not seen
        run.flops = flops.report()


@contextlib.contextmanager
def _phase(probe: MemoryProbe, flops: FlopCounter, name: str) -> Iterator[None]:
    with probe.phase(name), flops.backward() if name == "backward" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _counting_communication(run: Training) -> Iterator[None]:
    """Where there is more than one rank."""
    if run.engine.ranks.world_size == 1:
        yield
        return
    with CommunicationCounter() as counter:
        yield
    run.communication = counter.report()


def _set_learning_rate(run: Training, step: int, total: int) -> float:
    lr = learning_rate(step, total, run.config.training)
    for group in run.engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def _evaluate_and_keep_best(run: Training) -> None:
    """Evaluate on the split that chooses, and keep a copy of the weights if they are the best so far."""
    published = run.config.evaluation.protocol == "best-test"
    split, name = (run.data.test, "test") if published else (run.data.validation, "validation")
    metrics = evaluate(run, split)
    run.writer.write({"step": run.step, "split": name, **metrics})
    run.progress.evaluated(run.step, name, metrics)
    value = metrics[run.task.metric]
    if run.best_value is None or is_better(run.task.metric, value, run.best_value):
        run.best_value, run.best_step = value, run.step
        with averaged(run):
            # On the host: a second copy of everything that trains would count against the device.
            run.best_weights = run.engine.gather(kept_names(run.model))
    every = run.config.evaluation.pictures_every
    # Rounded up: the one after the last step may come before an interval is over.
    number = -(-run.step // evaluation_interval(run.config, run.data))
    if every is not None and number % every == 0:
        show(run, split, prefix=f"step-{run.step:06d}-")


def _log(
    run: Training,
    epoch: int,
    loss: Tensor,
    norms: Tensor,
    lr: float,
    seconds: float,
    figures: dict[str, float],
) -> None:
    line = {"step": run.step, "epoch": epoch, "loss": loss.item(), "lr": lr}
    line |= {"grad_norm": torch.linalg.vector_norm(norms).item(), "seconds": seconds, **figures}
    line |= {"time": time.time(), "total_steps": total_steps(run.config, run.data)}
    if run.peak_bytes is not None:
        line["peak_memory_bytes"] = run.peak_bytes
    run.writer.write(line)
    run.progress.logged(line)


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
