"""Single-label image classification: cross entropy, top-1 and top-5 accuracy."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from snell_scale.config import StrictModel
from snell_scale.interfaces import Batch, DataBundle, Evaluation, ModelBundle, StepOutput
from snell_scale.tasks.base import PlainTask, SummedEvaluation, check_fit


class ClassificationConfig(StrictModel):
    """Single-label classification with cross entropy; reports top-1 (and top-5) accuracy in percent."""

    name: Literal["classification"] = "classification"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Of the training loss only.")

    def build(self, *, data: DataBundle, model: ModelBundle) -> "Classification":
        """ValueError where data or model are not for classification, or there are fewer than two classes."""
        check_fit(self.name, data=data, model=model, needs={"image", "label"}, output="class_logits")
        return Classification(num_classes=len(data.class_names), label_smoothing=self.label_smoothing)


class Classification(PlainTask):
    """See `interfaces.Task`. Batches hold "image" (B, C, H, W) and "label" (B,) int64."""

    metric = "top1"

    def __init__(self, *, num_classes: int, label_smoothing: float) -> None:
        if num_classes < 2:
            raise ValueError(
                f"classification of {num_classes} class(es), expected at least 2; check data.classes"
            )
        self._has_top5 = num_classes > 5
        self.reported = ("top1", "top5") if self._has_top5 else ("top1",)
        self._label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits = model(batch["image"])
        loss = cross_entropy(logits.float(), batch["label"], label_smoothing=self._label_smoothing)
        return {"loss": loss, "outputs": logits}

    def evaluation(self, model: nn.Module, split: Dataset[Batch]) -> Evaluation:
        return SummedEvaluation(self._sums, self._metrics)

    def _sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        label = batch["label"]
        logits = model(batch["image"]).float()
        ranked = logits.topk(5 if self._has_top5 else 1, dim=1).indices == label.unsqueeze(1)
        sums = {
            "loss_sum": cross_entropy(logits, label, reduction="none").double().sum(),
            "correct1": ranked[:, 0].sum(),
            "count": torch.full((), len(label), dtype=torch.int64, device=label.device),
        }
        if self._has_top5:
            sums["correct5"] = ranked.any(dim=1).sum()
        return sums

    def _metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        count = int(sums["count"])
        if count == 0:
            raise ValueError("no sample was evaluated: the split is empty; check the data's sizes")
        metrics = {"top1": 100 * int(sums["correct1"]) / count}
        if self._has_top5:
            metrics["top5"] = 100 * int(sums["correct5"]) / count
        return metrics | {"loss": float(sums["loss_sum"]) / count}
