"""Classification: loss and metrics against by-hand values."""

import math

import pytest
import torch
from torch import Tensor, nn

from snell_scale.interfaces import Batch
from snell_scale.tasks.classification import Classification, ClassificationConfig
from tests.tasks.parts import data_of, model_of

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
LABELS = torch.tensor([0, 1, 0, 1])


class Fixed(nn.Module):
    """Returns the images it is given as logits."""

    def forward(self, image: Tensor) -> Tensor:
        return image


def task_of(*, classes: int = 3, label_smoothing: float = 0.0) -> Classification:
    data = data_of(class_names=[str(i) for i in range(classes)], fields={"image", "label"})
    return ClassificationConfig(label_smoothing=label_smoothing).build(data=data, model=model_of("class_logits"))


def batch(logits: Tensor = LOGITS, labels: Tensor = LABELS) -> Batch:
    return {"image": logits, "label": labels}


def metrics_of(task: Classification, *batches: Batch) -> dict[str, float]:
    evaluation = task.evaluation(Fixed(), data_of(class_names=[], fields=set()).test)
    for part in batches:
        evaluation.add(Fixed(), part)
    return evaluation.metrics(evaluation.sums())


def by_hand(logits: Tensor, labels: Tensor) -> list[float]:
    return [
        math.log(sum(math.exp(v) for v in row)) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]


def test_the_loss_is_mean_cross_entropy() -> None:
    output = task_of()(Fixed(), batch())
    losses = by_hand(LOGITS, LABELS)
    # float32 against Python floats
    assert output["loss"].item() == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert torch.equal(output["outputs"], LOGITS)


def test_label_smoothing_trains_but_does_not_report() -> None:
    plain, smooth = (task_of(label_smoothing=s) for s in (0.0, 0.3))
    rows = LOGITS.double().log_softmax(1)
    expected = (-0.7 * rows[range(4), LABELS] - 0.3 * rows.mean(1)).mean().item()
    assert smooth(Fixed(), batch())["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert metrics_of(smooth, batch()) == metrics_of(plain, batch())


def test_metrics_are_percent_and_mean_loss() -> None:
    task = task_of()
    metrics = metrics_of(task, batch())
    assert set(metrics) == {"top1", "loss"}  # no top-5 of three classes
    assert task.reported == ("top1",)
    assert metrics["top1"] == 50.0
    assert metrics["loss"] == pytest.approx(sum(by_hand(LOGITS, LABELS)) / 4, rel=1e-6)


def test_top5_counts_a_label_among_the_five_largest() -> None:
    logits = torch.arange(7.0).flip(0).repeat(3, 1)  # ranked 0, 1, 2, …
    task = task_of(classes=7)
    metrics = metrics_of(task, batch(logits, torch.tensor([0, 4, 5])))
    assert metrics["top1"] == pytest.approx(100 / 3)
    assert metrics["top5"] == pytest.approx(200 / 3)
    assert task.reported == ("top1", "top5")


def test_no_samples_and_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 2"):
        task_of(classes=1)
    with pytest.raises(ValueError, match="no sample was evaluated"):
        metrics_of(task_of(), batch(LOGITS[:0], LABELS[:0]))
