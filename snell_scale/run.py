"""One run from its config: assemble, train, report, and record how it ended, whatever happened."""

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from snell_scale.assembly import Assembly, assemble
from snell_scale.attempt import (
    Attempt,
    blank_result,
    echo_of_failure,
    memory_of_ranks,
    tell_failure,
    write_despite_trouble,
)
from snell_scale.conditions import conditions_of
from snell_scale.config import Config, to_dict
from snell_scale.data.batches import evaluation_batches
from snell_scale.instrument.environment import collect_environment
from snell_scale.instrument.snapshot import MemorySnapshot
from snell_scale.interfaces import Engine, Ranks, Tuner
from snell_scale.loop import evaluate, show, train
from snell_scale.preparation import find_checkpoint, set_up
from snell_scale.progress import make_progress
from snell_scale.records import Result, write_json, write_result, write_yaml
from snell_scale.run_folder import check_same_everywhere, clear, find_finished, locked
from snell_scale.signals import StopFlag, StopVote, stop_on_signal
from snell_scale.trackers.following import Following
from snell_scale.training import Training, rank_seed, total_steps

Resume = Literal["never", "auto"]


def run(
    config: Config,
    *,
    resume: Resume = "never",
    overwrite: bool = False,
    varied: Mapping[str, Any] | None = None,
    quiet: bool = False,
    may_differ: Collection[str] = (),
) -> Result:
    """Run `config` in its folder and return the result that was also written there, on every rank.

    Out of memory, divergence and interruption are results. Any other exception is recorded as "failed" and
    raised again. resume="auto": continue from the newest complete checkpoint, or return the result that stands.
    may_differ: dotted keys in which what is continued may differ from `config`.
    """
    if overwrite and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        resume, overwrite = "auto", False  # torchrun starts the same command again: what it replaced is gone
    with config.engine.join() as ranks, stop_on_signal() as stop_flag, _determinism(config):
        check_same_everywhere(config, ranks)
        folder = Path(config.output_dir) / config.name
        how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "may_differ": may_differ}
        standing = ranks.first(lambda: find_finished(folder, config, world_size=ranks.world_size, **how))
        if standing is not None:
            return standing
        attempt = Attempt(blank_result(config, varied or {}, world_size=ranks.world_size))
        try:
            # A mistake in the config ends here: no folder is made, no device touched.
            parts = assemble(config, world_size=ranks.world_size)
            with _own_folder(folder, ranks, overwrite=overwrite):
                ranks.before_end = partial(attempt.record_ended, folder)
                result = _run(parts, folder, attempt, ranks, stop_flag, quiet=quiet)
                ranks.first(lambda: write_result(folder, result))
                return result
        except BaseException as error:
            tell_failure(error, ranks)
            result = attempt.failed(error, ranks)
            if ranks.is_first and (attempt.owns_folder or result.status == "oom"):
                write_despite_trouble(folder, result)
            if result.status == "oom":
                return result
            echo = echo_of_failure(error, ranks)
            if echo is not None:
                raise echo from error
            raise


@contextlib.contextmanager
def _own_folder(folder: Path, ranks: Ranks, *, overwrite: bool) -> Iterator[None]:
    """The run's folder, kept from other runs by rank 0."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(folder))
            if overwrite:
                clear(folder)

        ranks.first(take)
        yield


def _run(
    parts: Assembly, folder: Path, attempt: Attempt, ranks: Ranks, stop_flag: StopFlag, *, quiet: bool
) -> Result:
    """Train and report; exceptions are the caller's."""
    config = parts.config
    torch.manual_seed(rank_seed(config.seed, ranks))
    engine: Engine = config.engine.build(ranks)
    ranks.beat()
    checkpoints, checkpoint = find_checkpoint(config, engine, folder)
    # Only now: until here another run's folder, or one that this engine cannot read, was left as it is.
    ranks.first(lambda: _write_circumstances(folder, config, engine))
    attempt.owns_folder = True
    attempt.result = replace(
        attempt.result,
        engine=engine.describe(),
        metric=parts.task.metric,
        reported=parts.task.reported,
        metric_sources=parts.task.describe_metrics(),
        skipped=parts.data.skipped,
        total_steps=total_steps(config, parts.data),
        num_trainable_params=parts.num_trainable_params,
        num_total_params=parts.num_total_params,
        conditions=_conditions(parts, engine),
    )
    with contextlib.ExitStack() as stack:
        display = make_progress(config.name, quiet=quiet or not ranks.is_first)
        followers = Following(display, config, folder, is_first=ranks.is_first)
        progress = stack.enter_context(contextlib.closing(followers))
        snapshot = stack.enter_context(_snapshot(config, engine, folder))
        vote = StopVote(stop_flag, ranks)
        training = set_up(parts, engine, folder, progress, vote, checkpoints=checkpoints, checkpoint=checkpoint)
        attempt.training, training.snapshot = training, snapshot
        stack.enter_context(contextlib.closing(training.writer))
        result = _train_and_report(training, attempt)
        progress.ended(result)
        # Only now: after a failure the other ranks do not vote any more.
        vote.close()
        training.checkpoints.close()
        return result


def _conditions(parts: Assembly, engine: Engine) -> dict[str, Any]:
    spec, ranks = parts.data.input_spec, engine.ranks
    image_size = (spec.height, spec.width)
    return conditions_of(parts.config, world_size=ranks.world_size, device=engine.device, image_size=image_size)


@contextlib.contextmanager
def _snapshot(config: Config, engine: Engine, folder: Path) -> Iterator[MemorySnapshot | None]:
    if not config.logging.memory_snapshot:
        yield None
        return
    ranks = engine.ranks
    snapshot = MemorySnapshot(engine.device, folder, rank=ranks.rank, world_size=ranks.world_size)
    with snapshot.recording():
        yield snapshot


def _write_circumstances(folder: Path, config: Config, engine: Engine) -> None:
    (folder / "result.json").unlink(missing_ok=True)  # of an attempt that was interrupted
    write_yaml(folder / "config.yaml", to_dict(config))
    write_json(folder / "environment.json", collect_environment(engine.device))


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
    result = replace(attempt.so_far(), memory=_memory_of_ranks(training))
    clock = time.perf_counter()
    metrics = _final_metrics(training)
    show(training, training.data.test)
    file_size = save_adapter(training.engine, training.tuner, training.folder / "adapter")
    evaluation = time.perf_counter() - clock
    seconds = {**result.seconds, "evaluate": evaluation, "total": result.seconds["total"] + evaluation}
    return replace(result, status="ok", metrics=metrics, file_size=file_size, seconds=seconds)


def _memory_of_ranks(training: Training) -> dict[str, Any] | None:
    """The memory of the rank with the largest peak, and that of all."""
    return memory_of_ranks(dict(enumerate(training.engine.ranks.gather(training.measured().memory))))


def _final_metrics(training: Training) -> dict[str, dict[str, float]]:
    """Metrics of the best weights, which stay loaded: validation again, and test for the first time."""
    training.engine.scatter(training.best_weights)
    training.averages = None  # the best weights are averages already, where averages were asked for
    validation, test = evaluate(training, training.data.validation), evaluate(training, training.data.test)
    training.model.eval()
    with training.probe.allocator.leaving_out(), torch.no_grad(), training.engine.autocast():
        test |= training.task.test_metrics(training.model, training.data)
    return {"validation": validation, "test": test}


def save_adapter(engine: Engine, tuner: Tuner, folder: Path) -> int:
    """Write the adapter so that `folder` appears whole or not at all; returns its bytes, on every rank."""
    tensors = engine.gather(tuner.saved_names())

    def write() -> int:
        aside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        num_bytes = tuner.save(aside, tensors)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        return num_bytes

    return engine.ranks.first(write)


def _measure_evaluation(training: Training) -> None:
    """One evaluation batch under the probe, as the phase "evaluate"."""
    if training.config.logging.memory_at_step is None:
        return
    batch = next(iter(evaluation_batches(training.data.validation, training.config.evaluation.batch_size)))
    training.model.eval()
    # Of the ranks each takes the same batch: where weights are sharded, a forward takes all ranks.
    probe, autocast = training.probe, training.engine.autocast()
    with probe.allocator.leaving_out(), probe, probe.phase("evaluate"), torch.no_grad(), autocast:
        evaluation = training.task.evaluation(training.model, training.data.validation)
        evaluation.add(training.model, training.engine.move(batch))
    training.model.train()


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
