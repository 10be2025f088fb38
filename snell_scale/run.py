"""One run from its config: assemble, train, report, and record how it ended, whatever happened."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from snell_scale.config import Config, to_dict
from snell_scale.data.batches import evaluation_batches, steps_per_epoch
from snell_scale.engines.checkpoint import load_newest_checkpoint
from snell_scale.instrument.environment import collect_environment
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.instrument.throughput import StepTimer
from snell_scale.interfaces import DataBundle, Engine, ModelBundle, Task, Tuner
from snell_scale.loop import Training, evaluate, load_trained_state, restore, total_steps, train
from snell_scale.models.activation_checkpointing import checkpoint_activations
from snell_scale.optimization import AveragedWeights, make_optimizer
from snell_scale.progress import Progress, make_progress
from snell_scale.records import Result, StepWriter, write_json, write_result, write_yaml
from snell_scale.run_folder import find_finished, prepare_folder
from snell_scale.signals import StopFlag, stop_on_signal

Resume = Literal["never", "auto"]


@dataclass(frozen=True)
class Assembly:
    """The parts of a run, built on the CPU: no device has been touched yet."""

    config: Config
    data: DataBundle
    bundle: ModelBundle
    task: Task
    tuner: Tuner
    total_parameters: int
    trainable_parameters: int


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
    raised again. resume="auto": continue from the newest complete checkpoint, or return the finished result.
    """
    folder = Path(config.output_dir) / config.name
    finished = find_finished(folder, config, resume=resume, overwrite=overwrite)
    if finished is not None:
        return finished
    started = time.perf_counter()
    # A mistake in the config ends here: no folder is made, no device touched.
    parts = assemble(config)
    prepare_folder(folder, overwrite=overwrite)
    result = blank_result(config, varied or {})
    with stop_on_signal() as stop_requested, _determinism(config):
        try:
            result = _run(parts, folder, result, stop_requested, quiet=quiet)
        except BaseException as error:
            if not _is_out_of_memory(error):
                _record_failure(folder, result, error)
                raise
            result = replace(result, status="oom", message=str(error))
    result = replace(result, seconds={**result.seconds, "total": time.perf_counter() - started})
    write_result(folder, result)
    return result


def assemble(config: Config) -> Assembly:
    """Build data, model, task and tuner on the CPU; every mistake in the config shows here."""
    config.engine.check()
    data = config.data.build(seed=config.data_seed)
    if config.training.batch_size > data.sizes["train"]:
        raise ValueError(
            f"training.batch_size={config.training.batch_size} is more than the {data.sizes['train']} training "
            "samples; lower it, or take more samples"
        )
    bundle = config.model.build(num_classes=len(data.class_names), input_spec=data.input_spec, seed=config.seed)
    task = config.task.build(class_names=data.class_names)
    total_count = sum(p.numel() for p in bundle.module.parameters())
    tuner = config.method.apply(
        bundle,
        total_steps=total_steps(config, data),
        steps_per_epoch=steps_per_epoch(data.train, config.training.batch_size),
        seed=config.seed,
    )
    return Assembly(config, data, bundle, task, tuner, total_count, tuner.num_trainable())


def _run(parts: Assembly, folder: Path, result: Result, stop_requested: StopFlag, *, quiet: bool) -> Result:
    """Train and report; exceptions are the caller's."""
    started = time.perf_counter()
    config = parts.config
    torch.manual_seed(config.seed)
    engine: Engine = config.engine.build()
    write_yaml(folder / "config.yaml", to_dict(config))
    write_json(folder / "environment.json", collect_environment(engine.device))
    result = replace(
        result,
        metric=parts.task.metric,
        total_steps=total_steps(config, parts.data),
        trainable_parameters=parts.trainable_parameters,
        total_parameters=parts.total_parameters,
    )
    progress = make_progress(config.name, quiet=quiet)
    try:
        training = _set_up(parts, engine, folder, progress, stop_requested)
        setup_seconds = time.perf_counter() - started
        result = _train_and_report(training, parts, result)
    finally:
        progress.close()
    return replace(result, seconds={"setup": setup_seconds, **result.seconds})


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
    extra = {"optimizer": averages.tensors()} if averages else None
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
        probe=MemoryProbe(module, engine.optimizer, extra=extra),
        progress=progress,
        stop_requested=stop_requested,
        averages=averages,
    )
    module.train()
    if state is not None:
        restore(training, state)
    return training


def _train_and_report(training: Training, parts: Assembly, result: Result) -> Result:
    """Train; then measure evaluation's memory, load the best weights, report test once, save the adapter."""
    resumed = (*result.resumed_from_steps, training.step) if training.step else result.resumed_from_steps
    clock = time.perf_counter()
    outcome = train(training)
    seconds = {"train": time.perf_counter() - clock}
    result = replace(
        result,
        steps=training.step,
        resumed_from_steps=resumed,
        seconds=seconds,
        throughput=training.timer.report(),
        memory=_memory(training),
    )
    if outcome.divergence is not None:
        found = outcome.divergence
        return replace(result, status="diverged", message=found.describe(), divergence=asdict(found))
    if outcome.interrupted:
        return replace(result, status="interrupted", message="stopped by a signal; --resume auto continues")
    clock = time.perf_counter()
    metrics = _final_metrics(training)
    adapter_bytes = save_adapter(training.tuner, training.folder / "adapter")
    return replace(
        result,
        status="ok",
        metrics=metrics,
        best_step=training.best_step,
        adapter_bytes=adapter_bytes,
        seconds={**seconds, "evaluate": time.perf_counter() - clock},
    )


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


def _memory(training: Training) -> dict[str, Any] | None:
    """The probe's report of the one measured step, with one evaluation batch measured now."""
    if training.config.logging.memory_at_step is None:
        return None
    batch = next(iter(evaluation_batches(training.data.validation, training.config.evaluation.batch_size)))
    training.model.eval()
    with training.probe, training.probe.phase("evaluate"), torch.no_grad(), training.engine.autocast():
        training.task.sums(training.model, training.engine.move(batch))
    training.model.train()
    return training.probe.report()


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


def _record_failure(folder: Path, result: Result, error: BaseException) -> None:
    """A best effort: recording must not hide the error that is about to be raised again."""
    with contextlib.suppress(OSError):
        write_result(folder, replace(result, status="failed", message=f"{type(error).__name__}: {error}"))


def _is_out_of_memory(error: BaseException) -> bool:
    """On the device, or on the host, where torch reports it as a plain RuntimeError."""
    host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return host or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextlib.contextmanager
def _determinism(config: Config) -> Iterator[None]:
    """Only deterministic algorithms while the run lasts, if its config asks for it."""
    before = torch.are_deterministic_algorithms_enabled()
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
