"""One run from its config: assemble, train, report, and record how it ended, whatever happened."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from snell_scale.assembly import Assembly, assemble
from snell_scale.config import Config, to_dict
from snell_scale.data.batches import evaluation_batches
from snell_scale.engines.checkpoint import load_newest_checkpoint
from snell_scale.instrument.environment import collect_environment
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.instrument.throughput import StepTimer
from snell_scale.interfaces import Engine, Tuner
from snell_scale.loop import evaluate, train
from snell_scale.models.activation_checkpointing import checkpoint_activations
from snell_scale.optimization import AveragedWeights, make_optimizer
from snell_scale.progress import Progress, make_progress
from snell_scale.records import Result, Status, StepWriter, write_json, write_result, write_yaml
from snell_scale.run_folder import find_finished, locked, prepare_folder
from snell_scale.signals import StopFlag, stop_on_signal
from snell_scale.training import Training, load_trained_state, restore, total_steps

Resume = Literal["never", "auto"]


def run(
    config: Config,
    *,
    resume: Resume = "never",
    overwrite: bool = False,
    varied: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Result:
    """Run `config` in its folder and return the result that was also written there.

    Out of memory, divergence and interruption are results. Any other exception is recorded as "failed" and
    raised again. resume="auto": continue from the newest complete checkpoint, or return the result that stands.
    """
    folder = Path(config.output_dir) / config.name
    standing = find_finished(folder, config, resume=resume, overwrite=overwrite)
    if standing is not None:
        return standing
    attempt = Attempt(blank_result(config, varied or {}))
    with stop_on_signal() as stop_requested, _determinism(config):
        try:
            # A mistake in the config ends here: no folder is made, no device touched.
            parts = assemble(config)
            with locked(folder):
                prepare_folder(folder, overwrite=overwrite)
                attempt.owns_folder = True
                result = _run(parts, folder, attempt, stop_requested, quiet=quiet)
                write_result(folder, result)
                return result
        except BaseException as error:
            status = _status_of(error)
            if status != "oom" and not attempt.owns_folder:
                raise
            result = replace(attempt.so_far(), status=status, message=f"{type(error).__name__}: {error}")
            _write_despite_trouble(folder, result)
            if status != "oom":
                raise
            return result


class Attempt:
    """What is known so far, for a record of a run that ends early."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.training: Training | None = None
        self.owns_folder = False
        self._started = time.perf_counter()

    def so_far(self) -> Result:
        """The result with what training has measured by now."""
        training, total = self.training, time.perf_counter() - self._started
        if training is None:
            return replace(self.result, seconds={"total": total})
        history = training.measured()
        return replace(
            self.result,
            steps=training.step,
            best_step=training.best_step,
            resumed_from_steps=history.resumed_from,
            seconds={"train": history.seconds, "total": total},
            throughput=history.throughput,
            memory=history.memory,
        )


def _run(parts: Assembly, folder: Path, attempt: Attempt, stop_requested: StopFlag, *, quiet: bool) -> Result:
    """Train and report; exceptions are the caller's."""
    config = parts.config
    torch.manual_seed(config.seed)
    engine: Engine = config.engine.build()
    write_yaml(folder / "config.yaml", to_dict(config))
    write_json(folder / "environment.json", collect_environment(engine.device))
    attempt.result = replace(
        attempt.result,
        metric=parts.task.metric,
        total_steps=total_steps(config, parts.data),
        trainable_parameters=parts.trainable_parameters,
        total_parameters=parts.total_parameters,
    )
    with contextlib.closing(make_progress(config.name, quiet=quiet)) as progress:
        training = _set_up(parts, engine, folder, progress, stop_requested)
        attempt.training = training
        with contextlib.closing(training.writer):
            return _train_and_report(training, attempt)


def _set_up(
    parts: Assembly, engine: Engine, folder: Path, progress: Progress, stop_requested: StopFlag
) -> Training:
    """Selection, checkpointing, compilation, placement, optimizer; then the state of an earlier attempt."""
    config, tuner = parts.config, parts.tuner
    state = load_newest_checkpoint(folder / "checkpoints")
    if tuner.needs_selection and state is None:  # a resumed run restores what was selected
        tuner.module.to(engine.device)
        tuner.select(_training_losses(parts, engine))
    if config.training.activation_checkpointing:
        checkpoint_activations(parts.bundle.module, parts.bundle.wrap_points)
    module = engine.setup(tuner.module, lambda m: make_optimizer(m, config.training, no_decay=tuner.no_decay))
    averages = AveragedWeights(module, config.training.ema_decay) if config.training.ema_decay else None
    training = Training(
        config=config,
        engine=engine,
        tuner=tuner,
        model=module,
        forward=cast(nn.Module, torch.compile(module)) if config.training.compile else module,
        task=parts.task,
        data=parts.data,
        folder=folder,
        writer=StepWriter(folder, keep_until_step=state["step"] if state else 0),
        timer=StepTimer(engine.device, config.logging.warmup_steps),
        probe=MemoryProbe(module, partial(_optimizer_tensors, engine, tuner, averages)),
        progress=progress,
        stop_requested=stop_requested,
        averages=averages,
    )
    module.train()
    if state is not None:
        restore(training, state)
    return training


def _optimizer_tensors(engine: Engine, tuner: Tuner, averages: AveragedWeights | None) -> list[Tensor]:
    """Everything that outlives a step beside parameters and gradients."""
    state = [value for entry in engine.optimizer.state.values() for value in entry.values()]
    own = [*tuner.tensors(), *(averages.tensors() if averages else ())]
    return [value for value in state if isinstance(value, Tensor)] + own


def _train_and_report(training: Training, attempt: Attempt) -> Result:
    """Train; then load the best weights, report test once, save the adapter."""
    outcome = train(training)
    if outcome.divergence is not None:
        found = outcome.divergence
        return replace(attempt.so_far(), status="diverged", message=found.describe(), divergence=asdict(found))
    if outcome.interrupted:
        message = "stopped by a signal; --resume auto continues"
        return replace(attempt.so_far(), status="interrupted", message=message)
    _measure_evaluation(training)
    result = attempt.so_far()
    clock = time.perf_counter()
    metrics = _final_metrics(training)
    adapter_bytes = save_adapter(training.tuner, training.folder / "adapter")
    evaluation = time.perf_counter() - clock
    seconds = {**result.seconds, "evaluate": evaluation, "total": result.seconds["total"] + evaluation}
    return replace(result, status="ok", metrics=metrics, adapter_bytes=adapter_bytes, seconds=seconds)


def _final_metrics(training: Training) -> dict[str, dict[str, float]]:
    """Metrics of the best weights, which stay loaded: validation again, and test for the first time."""
    load_trained_state(training.model, training.best_weights)
    training.averages = None  # the best weights are averages already, where averages were asked for
    return {
        "validation": evaluate(training, training.data.validation),
        "test": evaluate(training, training.data.test),
    }


def save_adapter(tuner: Tuner, folder: Path) -> int:
    """Write the adapter so that `folder` appears whole or not at all; returns its bytes."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    num_bytes = tuner.save(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return num_bytes


def _training_losses(parts: Assembly, engine: Engine) -> Iterator[Tensor]:
    """The loss of every training batch once, in a fixed order, for methods that select by gradient."""
    config = parts.config
    microbatch_size = config.training.batch_size // config.training.gradient_accumulation
    for batch in evaluation_batches(parts.data.train, microbatch_size):
        with engine.autocast():
            yield parts.task(parts.tuner.module, engine.move(batch))["loss"]


def _measure_evaluation(training: Training) -> None:
    """One evaluation batch under the probe, as the phase "evaluate"."""
    if training.config.logging.memory_at_step is None:
        return
    batch = next(iter(evaluation_batches(training.data.validation, training.config.evaluation.batch_size)))
    training.model.eval()
    with training.probe, training.probe.phase("evaluate"), torch.no_grad(), training.engine.autocast():
        training.task.sums(training.model, training.engine.move(batch))
    training.model.train()


def blank_result(config: Config, varied: Mapping[str, Any], *, message: str | None = None) -> Result:
    """What is known of a run before it starts; its status is "failed" until something better is known."""
    return Result(
        name=config.name,
        status="failed",
        method=config.method.name,
        model=config.model.describe(),
        dataset=config.data.name,
        task=config.task.name,
        engine=config.engine.name,
        precision=config.engine.precision,
        seed=config.seed,
        world_size=1,
        batch_size=config.training.batch_size,
        protocol=config.evaluation.protocol,
        message=message,
        varied=dict(varied),
    )


def _status_of(error: BaseException) -> Status:
    """What an exception makes of the run. Out of memory on the host is a plain RuntimeError in torch."""
    on_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if on_host or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _write_despite_trouble(folder: Path, result: Result) -> None:
    """A best effort: recording must not hide the error that is about to be raised again."""
    with contextlib.suppress(OSError):
        write_result(folder, result)


@contextlib.contextmanager
def _determinism(config: Config) -> Iterator[None]:
    """Only deterministic algorithms while the run lasts, if its config asks for it."""
    before = torch.are_deterministic_algorithms_enabled()
    if config.training.deterministic:
        # cuBLAS reads it when it starts, and refuses deterministic mode without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
