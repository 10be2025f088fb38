"""From a run's parts to a training: selection, placement and sharding, optimizer, an earlier attempt's state."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from snell_scale.assembly import Assembly
from snell_scale.config import Config
from snell_scale.data.batches import evaluation_share, samples_per_forward
from snell_scale.engines.checkpoint import Checkpoint, Checkpoints
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.instrument.throughput import StepTimer
from snell_scale.interfaces import Engine, Ranks, StepPlan, Tuner
from snell_scale.models.activation_checkpointing import checkpoint_activations
from snell_scale.optimization import AveragedWeights, make_optimizer
from snell_scale.progress import Progress
from snell_scale.records import NoWriter, StepWriter
from snell_scale.signals import StopVote
from snell_scale.training import Training, restore


def find_checkpoint(config: Config, engine: Engine, folder: Path) -> tuple[Checkpoints, Checkpoint | None]:
    """(where the run's checkpoints are, the newest). ValueError where the engine cannot read that one."""
    checkpoints = Checkpoints(
        folder / "checkpoints",
        engine.ranks,
        keep_last=config.checkpoint.keep_last,
        asynchronous=config.checkpoint.asynchronous,
    )
    newest = checkpoints.newest()
    if newest is not None:
        engine.check_checkpoint(newest.layout)
    return checkpoints, newest


def set_up(
    parts: Assembly,
    engine: Engine,
    folder: Path,
    progress: Progress,
    vote: StopVote,
    *,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None = None,
) -> Training:
    """Selection, activation checkpointing, placement and sharding, optimizer; then the checkpoint's state."""
    config, tuner, ranks = parts.config, parts.tuner, engine.ranks
    parts = _prepared(parts, engine, selects=tuner.needs_selection and checkpoint is None)
    module, forward = _distribute(parts, engine)
    averages = AveragedWeights(module, config.training.ema_decay) if config.training.ema_decay else None
    ranks.beat()
    training = Training(
        config=config,
        engine=engine,
        tuner=tuner,
        model=module,
        forward=cast(nn.Module, torch.compile(forward)) if config.training.compile else forward,
        task=parts.task,
        data=parts.data,
        folder=folder,
        writer=_open_writer(folder, ranks, keep_until_step=checkpoint.step if checkpoint else 0),
        checkpoints=checkpoints,
        timer=StepTimer(engine.device, config.logging.warmup_steps, num_devices=ranks.world_size),
        probe=MemoryProbe(module, partial(_optimizer_tensors, engine, tuner, averages), extra=engine.held),
        progress=progress,
        stop_requested=vote,
        averages=averages,
    )
    module.train()
    if checkpoint is not None:
        restore(training, checkpoint)
    return training


def _open_writer(folder: Path, ranks: Ranks, *, keep_until_step: int) -> StepWriter | NoWriter:
    opened: list[StepWriter] = []
    # So that all ranks hear of a full disk; what opens the file here alone is not sent to them.
    ranks.first(lambda: opened.append(StepWriter(folder, keep_until_step=keep_until_step)))
    return opened[0] if opened else NoWriter()


def _prepared(parts: Assembly, engine: Engine, *, selects: bool) -> Assembly:
    """With the task's data, and with weights selected; a resumed run restores which ones were."""
    # As it is before it knows the other ranks: in selecting, a rank's batches are its own, some ranks have fewer.
    alone = copy.copy(parts.task)
    parts = replace(parts, data=parts.task.prepare(parts.data, engine))
    if selects:
        parts.tuner.module.to(engine.device)
        parts.tuner.select(_training_losses(replace(parts, task=alone), engine), engine.sum_in_place)
    return parts


def _distribute(parts: Assembly, engine: Engine) -> tuple[nn.Module, nn.Module]:
    """(module, what a step calls): checkpointed, sharded, with an optimizer."""
    config, tuner = parts.config, parts.tuner
    blocks = [parts.bundle.module.get_submodule(name) for name in parts.bundle.wrap_points]
    if config.training.activation_checkpointing:
        checkpoint_activations(parts.bundle.module, parts.bundle.wrap_points)
    plan = StepPlan(
        microbatch_size=_samples_per_forward(config, engine.ranks),
        gradient_accumulation=config.training.gradient_accumulation,
        clip_grad_norm=config.training.clip_grad_norm,
    )
    forward = engine.setup(
        tuner.module,
        lambda module: make_optimizer(module, config.training, no_decay=tuner.no_decay),
        blocks=blocks,
        plan=plan,
    )
    tuner.bind(engine)
    return tuner.module, forward


def _samples_per_forward(config: Config, ranks: Ranks) -> int:
    training = config.training
    return samples_per_forward(training.batch_size, training.gradient_accumulation, ranks.world_size)


def _optimizer_tensors(engine: Engine, tuner: Tuner, averages: AveragedWeights | None) -> list[Tensor]:
    """Everything that outlives a step beside parameters and gradients."""
    state = [value for entry in engine.optimizer.state.values() for value in entry.values()]
    own = [*tuner.tensors(), *(averages.tensors().values() if averages else ())]
    return [value for value in state if isinstance(value, Tensor)] + own


def _training_losses(parts: Assembly, engine: Engine) -> Iterator[Tensor]:
    """The loss of every training batch once over all ranks, in a fixed order, to select by gradient."""
    ranks = engine.ranks
    size = parts.config.training.batch_size // parts.config.training.gradient_accumulation
    for batch, counts in evaluation_share(parts.data.train, size, rank=ranks.rank, world_size=ranks.world_size):
        if counts:
            ranks.beat()
            with engine.autocast():
                yield parts.task(parts.tuner.module, engine.move(batch))["loss"]
