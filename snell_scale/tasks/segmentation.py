"""Semantic segmentation: cross entropy (and Dice) over pixels; mIoU, Dice and accuracy of a whole split."""

from collections.abc import Mapping, Sequence, Sized
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.utils.data import Dataset

from snell_scale.config import StrictModel
from snell_scale.interfaces import (
    IGNORED_PIXEL,
    Batch,
    DataBundle,
    Engine,
    Evaluation,
    InputSpec,
    ModelBundle,
    Ranks,
    StepOutput,
)
from snell_scale.tasks.base import PlainTask, SummedEvaluation, check_fit
from snell_scale.tasks.confusion import confusion_matrix, confusion_metrics
from snell_scale.tasks.overlays import Example, picture_of
from snell_scale.tasks.sliding_window import Inference


class SegmentationConfig(StrictModel):
    """Semantic segmentation; reports mIoU, mean Dice and pixel accuracy in percent, and the IoU of each class."""

    name: Literal["segmentation"] = "segmentation"
    class_weights: dict[str, float] = Field(
        default={}, description="Class name → factor of its pixels in the cross entropy; others have 1."
    )
    auxiliary_weight: float = Field(
        default=0.4, ge=0, description="Of each auxiliary head's loss, where the model has such heads."
    )
    dice_weight: float = Field(
        default=0.0, ge=0, description="Of a soft Dice loss over all classes but the first (the background)."
    )
    inference: Literal["whole", "sliding"] = Field(
        default="whole", description="Evaluation sees the image at once, or window by window."
    )
    window: int | None = Field(
        default=None, gt=0, description="Pixels of a sliding window's side; null: the model's input size."
    )
    stride: int | None = Field(
        default=None, gt=0, description="Pixels from window to window; null: two thirds of the window."
    )
    windows_per_forward: int = Field(default=8, gt=0, description="Sliding windows in one call of the model.")
    scales: tuple[float, ...] = Field(
        default=(1.0,), min_length=1, description="Evaluation averages over these factors of the image's size."
    )
    size_multiple: int = Field(
        default=1,
        gt=0,
        description="Whole images are resized to sides that are multiples of it: a plain ViT's patch size.",
    )
    flip: bool = Field(default=False, description="Evaluation averages over the mirrored image, too.")
    shown: int = Field(default=4, gt=0, description="Samples in the picture of predictions.")

    @model_validator(mode="after")
    def _check(self) -> "SegmentationConfig":
        if self.inference == "whole" and (self.window is not None or self.stride is not None):
            raise ValueError(
                "window and stride belong to sliding inference; set inference=sliding, or remove them"
            )
        if self.window is not None and (self.stride or 0) > self.window:
            raise ValueError(
                f"stride={self.stride} is above window={self.window}: pixels between would be unseen"
            )
        if not all(scale > 0 for scale in self.scales):
            raise ValueError(f"scales={list(self.scales)}, expected positive factors, e.g. [0.75, 1.0, 1.25]")
        if not all(weight >= 0 for weight in self.class_weights.values()):
            raise ValueError(f"class_weights={self.class_weights}, expected factors of at least 0")
        return self

    def build(self, *, data: DataBundle, model: ModelBundle) -> "Segmentation":
        """ValueError where data or model are not for segmentation, or a weight is of no class of the data."""
        check_fit(self.name, data=data, model=model, needs={"image", "mask"}, output="pixel_logits")
        names = data.class_names
        if not 2 <= len(names) <= IGNORED_PIXEL:
            raise ValueError(f"segmentation into {len(names)} class(es), expected 2 to {IGNORED_PIXEL}")
        unknown = sorted(self.class_weights.keys() - set(names))
        if unknown:
            raise ValueError(
                f"task.class_weights has {unknown[0]!r}, which is no class of the data: {', '.join(names)}"
            )
        return Segmentation(self, class_names=names, input_spec=data.input_spec, inference=self._inference(model))

    def _inference(self, model: ModelBundle) -> Inference:
        if self.inference == "whole":
            return Inference(scales=self.scales, flip=self.flip, multiple=self.size_multiple)
        own = (model.input_spec.height, model.input_spec.width)
        height, width = (self.window, self.window) if self.window is not None else own
        if self.stride is not None and self.stride > min(height, width):
            raise ValueError(f"task.stride={self.stride} is above the window's {height}x{width}; lower it")
        stride = (self.stride, self.stride) if self.stride else (-(-2 * height // 3), -(-2 * width // 3))
        return Inference((height, width), stride, self.scales, self.flip, self.windows_per_forward)


class Segmentation(PlainTask):
    """See `interfaces.Task`. Batches hold "image" (B, C, H, W) and "mask" (B, h, w) int64; IGNORED_PIXEL: none.

    While training, the model may return (logits, auxiliary logits) instead of logits. Evaluation batches may hold
    images padded at the right and below, with "image_size" and "mask_size" (B, 2) int64, the (height, width) that
    is no padding: image and mask may differ in size, and logits are brought to the mask's.
    """

    metric = "miou"
    reported = ("miou", "mdice", "pixel_accuracy")

    def __init__(
        self,
        config: SegmentationConfig,
        *,
        class_names: Sequence[str],
        input_spec: InputSpec,
        inference: Inference,
    ) -> None:
        self._config = config
        self._class_names = class_names
        self._spec = input_spec
        self._inference = inference
        self._weights = torch.tensor([config.class_weights.get(name, 1.0) for name in class_names])
        self._engine: Engine | None = None

    def prepare(self, data: DataBundle, engine: Engine) -> DataBundle:
        self._engine = engine
        return data

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        output = model(batch["image"])
        logits, auxiliary = output if isinstance(output, tuple) else (output, ())
        loss = self._loss(logits, batch["mask"])
        for more in auxiliary:
            loss = loss + self._config.auxiliary_weight * self._cross_entropy(more, batch["mask"])
        return {"loss": loss, "outputs": logits}

    def evaluation(self, model: nn.Module, split: Dataset[Batch]) -> Evaluation:
        return SummedEvaluation(self._sums, self._metrics)

    def pictures(self, model: nn.Module, split: Dataset[Batch]) -> dict[str, Tensor]:
        """The first samples of the split: image, truth and prediction side by side."""
        number = min(self._config.shown, len(cast(Sized, split)))
        examples = []
        for index in range(number):
            batch = {name: value.unsqueeze(0) for name, value in split[(index, 0)].items()}
            batch = self._engine.move(batch) if self._engine is not None else batch
            for images, masks in _parts(batch):
                size = (masks.shape[1], masks.shape[2])
                predicted = self._inference.log_probabilities(model, images, size).argmax(1)
                examples.append(Example(images[0].cpu(), masks[0].cpu(), predicted[0].cpu()))
        return {"predictions": picture_of(examples, spec=self._spec, class_names=self._class_names)}

    def _loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        loss = self._cross_entropy(logits, mask)
        if self._config.dice_weight > 0:
            loss = loss + self._config.dice_weight * dice_loss(logits, mask)
        return loss

    def _cross_entropy(self, logits: Tensor, mask: Tensor) -> Tensor:
        if self._weights.device != logits.device:
            self._weights = self._weights.to(logits.device)
        return pixel_cross_entropy(logits, mask, class_weights=self._weights)

    def _sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        num_classes = len(self._class_names)
        parts = _parts(batch)
        idle = self._idle_forwards(sum(self._inference.num_forwards(images) for images, _ in parts))
        confusion = batch["mask"].new_zeros(num_classes, num_classes)
        loss_sum = torch.zeros((), dtype=torch.float64, device=confusion.device)
        for images, masks in parts:
            log_probabilities = self._inference.log_probabilities(model, images, (masks.shape[1], masks.shape[2]))
            confusion += confusion_matrix(log_probabilities.argmax(1), masks, num_classes)
            losses = nll_loss(log_probabilities, masks, ignore_index=IGNORED_PIXEL, reduction="none")
            loss_sum += losses.double().sum()
        for _ in range(idle):
            self._inference.idle_forward(model, batch["image"])
        return {"confusion": confusion, "loss_sum": loss_sum}

    def _idle_forwards(self, own: int) -> int:
        """How many more forwards the busiest rank makes: where weights are sharded, each takes all ranks."""
        ranks: Ranks | None = self._engine.ranks if self._engine is not None else None
        return max(ranks.gather(own)) - own if ranks is not None and ranks.world_size > 1 else 0

    def _metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        metrics = confusion_metrics(sums["confusion"], self._class_names)
        return metrics | {"loss": float(sums["loss_sum"]) / int(sums["confusion"].sum())}


def pixel_cross_entropy(logits: Tensor, mask: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """Cross entropy, 0-d float32: (weighted) sum over the pixels that have a class, divided by ALL pixels.

    logits (B, classes, H, W), mask (B, H, W) int64. So mmseg's default has it. The mean over the labelled pixels
    alone would be 0/0 for a batch without any, and that of a step would depend on how its samples are shared
    between ranks and microbatches.
    """
    weights = class_weights.to(torch.float32) if class_weights is not None else None
    losses = cross_entropy(logits.float(), mask, weight=weights, ignore_index=IGNORED_PIXEL, reduction="none")
    return losses.mean()


def dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """1 - (2·overlap + 1) / (sum of probabilities + pixels + 1): mean over images and all classes but the first.

    For binary medical masks, where few pixels are foreground; ignored pixels are in no sum. An image without the
    class costs what the model believes to see of it.
    """
    valid = (mask != IGNORED_PIXEL).unsqueeze(1)
    classes = torch.arange(1, logits.shape[1], device=mask.device).view(1, -1, 1, 1)
    truth = (mask.unsqueeze(1) == classes).float()
    found = logits.float().softmax(1)[:, 1:] * valid
    overlap, total = (found * truth).sum((2, 3)), (found + truth).sum((2, 3))
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def _parts(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(images, masks) without padding: the batch as it is, or, where sizes differ, its samples one by one."""
    images, masks = batch["image"], batch["mask"]
    if "image_size" not in batch:
        return [(images, masks)]
    sizes = torch.cat([batch["image_size"], batch["mask_size"]], dim=1)
    if bool((sizes == sizes[0]).all()):
        return [(images, masks)]
    return [
        (images[i : i + 1, :, :height, :width], masks[i : i + 1, :rows, :columns])
        for i, (height, width, rows, columns) in enumerate(sizes.tolist())
    ]
