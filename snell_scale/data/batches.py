"""Batches in an order that is a pure function of (seed, epoch), so that a run continues from any step."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from snell_scale.interfaces import Batch, SampleKey


@runtime_checkable
class BatchedDataset(Protocol):
    """A data set that looks up many samples at once and returns them stacked."""

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Batch] | Batch: ...


class StepBatches(NamedTuple):
    """This rank's microbatches of one optimizer step. Step and epoch count from 0."""

    step: int
    epoch: int
    is_epoch_start: bool
    microbatches: list[Batch]


def training_batches(
    dataset: Dataset[Batch],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    gradient_accumulation: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[StepBatches]:
    """Optimizer steps from `start_step` on, forever; a step's samples do not depend on where one starts.

    Every epoch is a new permutation; the samples that fill no whole batch are left out of it. `batch_size`
    samples make a step, in `gradient_accumulation` equal microbatches, of each of which rank `rank` gets its
    equal share: the samples of a step do not depend on the number of ranks.
    ValueError: fewer samples than a batch, or a batch that does not divide.
    """
    share = samples_per_forward(batch_size, gradient_accumulation, world_size)
    per_epoch = steps_per_epoch(dataset, batch_size)
    steps = _step_indices(num_samples(dataset), batch_size=batch_size, seed=seed, start_step=start_step)
    keys = (
        [(int(index), epoch) for index in indices[first : first + share]]
        for _, epoch, indices in steps
        for first in range(rank * share, batch_size, world_size * share)
    )
    return _steps(_load(dataset, keys, num_workers), start_step, per_epoch, gradient_accumulation)


def samples_per_forward(batch_size: int, gradient_accumulation: int, world_size: int) -> int:
    """Samples of one microbatch on one rank. ValueError where the batch does not divide into equal ones."""
    parts = gradient_accumulation * world_size
    if parts < 1 or batch_size % parts:
        ranks = f" x {world_size} ranks" if world_size > 1 else ""
        raise ValueError(
            f"batch_size={batch_size} does not divide into gradient_accumulation={gradient_accumulation}{ranks} "
            "equal microbatches; change one of them"
        )
    return batch_size // parts


def evaluation_batches(dataset: Dataset[Batch], batch_size: int, *, num_workers: int = 0) -> Iterator[Batch]:
    """Every sample once, in order, as of epoch 0; the last batch may be smaller."""
    return _load(dataset, _evaluation_keys(dataset, batch_size), num_workers)


def evaluation_share(
    dataset: Dataset[Batch], batch_size: int, *, rank: int, world_size: int, num_workers: int = 0
) -> Iterator[tuple[Batch, bool]]:
    """This rank's part of `evaluation_batches`, every `world_size`-th; with each, whether it counts.

    All ranks get as many batches, for where weights are sharded a forward takes all of them: who has none left
    gets the first batch again, which does not count.
    """
    keys = _evaluation_keys(dataset, batch_size)
    yield from ((batch, True) for batch in _load(dataset, keys[rank::world_size], num_workers))
    if len(keys) % world_size and rank >= len(keys) % world_size:
        yield next(_load(dataset, keys[:1], num_workers=0)), False


def steps_per_epoch(dataset: Dataset[Batch], batch_size: int) -> int:
    """Whole batches in one pass. ValueError if there is none."""
    total = num_samples(dataset)
    if batch_size < 1 or total < batch_size:
        raise ValueError(
            f"batch_size={batch_size}, but the training split has {total} samples: expected at least one whole "
            "batch; lower training.batch_size or take more samples"
        )
    return total // batch_size


def num_samples(dataset: Dataset[Batch]) -> int:
    """`len(dataset)`, which torch's Dataset does not declare. ValueError for an endless data set."""
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{type(dataset).__name__} has no length, expected a data set that is indexed by sample")
    return len(cast(Sequence[Batch], dataset))


def collate(samples: list[Batch] | Batch) -> Batch:
    """Stack samples, unless the data set returned them stacked."""
    return samples if isinstance(samples, dict) else default_collate(samples)


def _evaluation_keys(dataset: Dataset[Batch], batch_size: int) -> list[list[SampleKey]]:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected at least 1")
    total = num_samples(dataset)
    firsts = range(0, total, batch_size)
    return [[(index, 0) for index in range(first, min(first + batch_size, total))] for first in firsts]


def _step_indices(
    total: int, *, batch_size: int, seed: int, start_step: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(step, epoch, sample indices) from `start_step` on, forever."""
    per_epoch = total // batch_size
    first_epoch, skipped = divmod(start_step, per_epoch)
    for epoch in count(first_epoch):
        order = np.random.default_rng([seed, epoch]).permutation(total)
        for position in range(skipped if epoch == first_epoch else 0, per_epoch):
            first = position * batch_size
            yield epoch * per_epoch + position, epoch, order[first : first + batch_size]


def _steps(
    microbatches: Iterator[Batch], start_step: int, per_epoch: int, gradient_accumulation: int
) -> Iterator[StepBatches]:
    for step in count(start_step):
        epoch, position = divmod(step, per_epoch)
        yield StepBatches(step, epoch, position == 0, list(islice(microbatches, gradient_accumulation)))


def _load(dataset: Dataset[Batch], keys: Iterable[list[SampleKey]], num_workers: int) -> Iterator[Batch]:
    if num_workers > 0:
        # Its own generator: the loader draws a seed, and the global one must be where a resumed run expects it.
        return iter(
            DataLoader(
                dataset,
                batch_sampler=keys,
                collate_fn=collate,
                num_workers=num_workers,
                generator=torch.Generator(),
            )
        )
    if isinstance(dataset, BatchedDataset):
        return (collate(dataset.__getitems__(batch)) for batch in keys)
    return (collate([dataset[key] for key in batch]) for batch in keys)
