"""Classification: loss and metrics against by-hand values, sums that add up; the contract of every task."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snell_scale.interfaces import Batch
from snell_scale.registry import config_class, names
from snell_scale.tasks.classification import ClassificationConfig

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
LABELS = torch.tensor([0, 1, 0, 1])


class Fixed(nn.Module):
    """Returns the images it is given as logits."""

    def forward(self, image: Tensor) -> Tensor:
        return image


def batch(logits: Tensor = LOGITS, labels: Tensor = LABELS) -> Batch:
    return {"image": logits, "label": labels}


def by_hand(logits: Tensor, labels: Tensor) -> list[float]:
    return [
        math.log(sum(math.exp(v) for v in row)) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]


def test_the_loss_is_mean_cross_entropy() -> None:
    task = ClassificationConfig().build(class_names=["a", "b", "c"])
    output = task(Fixed(), batch())
    losses = by_hand(LOGITS, LABELS)
    # float32 against Python floats
    assert output["loss"].item() == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert torch.equal(output["outputs"], LOGITS)


def test_label_smoothing_trains_but_does_not_report() -> None:
    names = ["a", "b", "c"]
    plain, smooth = (ClassificationConfig(label_smoothing=s).build(class_names=names) for s in (0.0, 0.3))
    rows = LOGITS.double().log_softmax(1)
    expected = (-0.7 * rows[range(4), LABELS] - 0.3 * rows.mean(1)).mean().item()
    assert smooth(Fixed(), batch())["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert smooth.metrics(smooth.sums(Fixed(), batch())) == plain.metrics(plain.sums(Fixed(), batch()))


def test_metrics_are_percent_and_mean_loss() -> None:
    task = ClassificationConfig().build(class_names=["a", "b", "c"])
    metrics = task.metrics(task.sums(Fixed(), batch()))
    assert set(metrics) == {"top1", "loss"}  # no top-5 of three classes
    assert metrics["top1"] == 50.0
    assert metrics["loss"] == pytest.approx(sum(by_hand(LOGITS, LABELS)) / 4, rel=1e-6)


def test_top5_counts_a_label_among_the_five_largest() -> None:
    task = ClassificationConfig().build(class_names=[str(i) for i in range(7)])
    logits = torch.arange(7.0).flip(0).repeat(3, 1)  # ranked 0, 1, 2, …
    metrics = task.metrics(task.sums(Fixed(), batch(logits, torch.tensor([0, 4, 5]))))
    assert metrics["top1"] == pytest.approx(100 / 3)
    assert metrics["top5"] == pytest.approx(200 / 3)


def test_no_samples_and_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 2"):
        ClassificationConfig().build(class_names=["a"])
    task = ClassificationConfig().build(class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="no sample was evaluated"):
        task.metrics(task.sums(Fixed(), batch(LOGITS[:0], LABELS[:0])))


@pytest.mark.parametrize("name", names("task"))
def test_contract_sums_of_parts_give_the_metrics_of_the_whole(name: str) -> None:
    task: Any = config_class("task", name).model_validate({"name": name}).build(class_names=["a", "b", "c"])
    whole = task.sums(Fixed(), batch())
    parts = [task.sums(Fixed(), batch(LOGITS[part], LABELS[part])) for part in (slice(0, 1), slice(1, 4))]
    added = {key: parts[0][key] + parts[1][key] for key in whole}
    assert all(value.dtype in (torch.float64, torch.int64) for value in whole.values())
    # float64 sums of the same four numbers in another order
    assert task.metrics(added) == pytest.approx(task.metrics(whole), rel=1e-12)
    assert task.metric in task.metrics(whole)


@pytest.mark.parametrize("name", names("task"))
def test_contract_the_loss_trains_and_sums_do_not(name: str) -> None:
    task: Any = config_class("task", name).model_validate({"name": name}).build(class_names=["a", "b", "c"])
    model = nn.Linear(3, 3)
    output = task(model, batch())
    assert output["loss"].ndim == 0
    output["loss"].backward()
    assert model.weight.grad is not None
    assert not any(value.requires_grad for value in task.sums(model, batch()).values())
