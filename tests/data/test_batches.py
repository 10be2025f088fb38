"""The order of batches is a pure function of (seed, epoch): resuming, workers and microbatches change nothing."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from snell_scale.data.batches import (
    StepBatches,
    evaluation_batches,
    evaluation_share,
    steps_per_epoch,
    training_batches,
)
from snell_scale.interfaces import Batch, SampleKey


class Numbers(Dataset[Batch]):
    """Samples that show the key they were looked up by."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, key: SampleKey) -> Batch:
        return {"key": torch.tensor(key)}


class StackedNumbers(Numbers):
    """The same, looked up many at once."""

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        return {"key": torch.tensor(keys)}


def steps_from(
    start_step: int, *, dataset: Dataset[Batch] | None = None, accumulation: int = 1, num_workers: int = 0
) -> Iterator[StepBatches]:
    return training_batches(
        dataset or Numbers(10),
        batch_size=4,
        seed=3,
        start_step=start_step,
        gradient_accumulation=accumulation,
        num_workers=num_workers,
    )


def keys_of(steps: Iterator[StepBatches], count: int) -> Tensor:
    return torch.stack([torch.cat([b["key"] for b in s.microbatches]) for s in islice(steps, count)])


def test_an_epoch_is_a_permutation_and_drops_what_fills_no_batch() -> None:
    keys = keys_of(steps_from(0), 6)  # 10 samples in batches of 4: 2 steps an epoch
    for epoch in range(3):
        indices = keys[2 * epoch : 2 * epoch + 2, :, 0].flatten().tolist()
        assert len(set(indices)) == 8
        assert set(indices) <= set(range(10))
        assert keys[2 * epoch : 2 * epoch + 2, :, 1].unique().tolist() == [epoch]
    assert not torch.equal(keys[:2, :, 0], keys[2:4, :, 0])


def test_step_epoch_and_epoch_start_are_counted_from_zero() -> None:
    labels = [(s.step, s.epoch, s.is_epoch_start) for s in islice(steps_from(1), 4)]
    assert labels == [(1, 0, False), (2, 1, True), (3, 1, False), (4, 2, True)]


@pytest.mark.parametrize("start_step", [1, 2, 3, 7])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_at_any_step_gives_the_batches_of_the_unbroken_run(start_step: int, accumulation: int) -> None:
    unbroken = keys_of(steps_from(0, accumulation=accumulation), start_step + 4)
    assert torch.equal(keys_of(steps_from(start_step, accumulation=accumulation), 4), unbroken[start_step:])


def test_microbatches_split_the_same_step() -> None:
    halves = next(steps_from(0, accumulation=2)).microbatches
    assert [len(b["key"]) for b in halves] == [2, 2]
    assert torch.equal(keys_of(steps_from(0, accumulation=2), 3), keys_of(steps_from(0), 3))


def test_another_seed_is_another_order() -> None:
    other = training_batches(Numbers(10), batch_size=4, seed=4, start_step=0, gradient_accumulation=1)
    assert not torch.equal(keys_of(other, 2), keys_of(steps_from(0), 2))


@pytest.mark.parametrize("dataset", [StackedNumbers(10), Numbers(10)], ids=["stacked", "one by one"])
def test_workers_and_batched_lookup_give_the_same_batches(dataset: Dataset[Batch]) -> None:
    expected = keys_of(steps_from(1), 5)
    assert torch.equal(keys_of(steps_from(1, dataset=dataset), 5), expected)
    assert torch.equal(keys_of(steps_from(1, dataset=dataset, num_workers=1), 5), expected)


def test_the_global_random_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    keys_of(steps_from(0), 3)
    keys_of(steps_from(0, num_workers=1), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_data_set_that_returns_a_list_of_samples_is_stacked() -> None:
    batch = next(evaluation_batches(ListedNumbers(2), 2))
    assert batch["key"].tolist() == [[0, 0], [1, 0]]


class ListedNumbers(Numbers):
    """Looked up many at once in torch's own convention."""

    def __getitems__(self, keys: list[SampleKey]) -> list[Batch]:
        return [self[key] for key in keys]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 64])
def test_evaluation_counts_every_sample_once_in_order(batch_size: int) -> None:
    keys = torch.cat([b["key"] for b in evaluation_batches(Numbers(10), batch_size)])
    assert keys[:, 0].tolist() == list(range(10))
    assert keys[:, 1].tolist() == [0] * 10


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_a_rank_reads_its_own_share_of_an_evaluation_only(batch_size: int) -> None:
    shares = []
    for rank in range(3):
        dataset = CountedNumbers(10)
        share = list(evaluation_share(dataset, batch_size, rank=rank, world_size=3))
        assert dataset.num_read == sum(len(batch["key"]) for batch, _ in share)
        shares.append(share)
    assert len({len(share) for share in shares}) == 1
    counted = [batch["key"][:, 0] for share in shares for batch, counts in share if counts]
    assert torch.cat(counted).sort().values.tolist() == list(range(10))


class CountedNumbers(Numbers):
    num_read = 0

    def __getitem__(self, key: SampleKey) -> Batch:
        self.num_read += 1
        return super().__getitem__(key)


def test_steps_per_epoch_counts_whole_batches() -> None:
    assert steps_per_epoch(Numbers(10), 4) == 2
    assert steps_per_epoch(Numbers(10), 10) == 1


class Endless(Dataset[Batch]):
    """A data set without a length."""


def test_mistakes_are_named_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="batch_size=4.*3 samples.*lower training.batch_size"):
        training_batches(Numbers(3), batch_size=4, seed=0, start_step=0, gradient_accumulation=1)
    with pytest.raises(ValueError, match="does not divide into gradient_accumulation=3"):
        training_batches(Numbers(9), batch_size=4, seed=0, start_step=0, gradient_accumulation=3)
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluation_batches(Numbers(3), 0)
    with pytest.raises(ValueError, match="Endless has no length"):
        steps_per_epoch(Endless(), 1)
