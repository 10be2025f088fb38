"""Segmentation metrics from one confusion matrix of a whole split.

torchmetrics' `segmentation.MeanIoU` knows no ignored label and averages per image; its JaccardIndex gives this
mIoU (the tests compare them), but neither Dice nor accuracy from the same counts, and it reduces over ranks by
itself, which here is the engine's part.

Published polyp tables have another "mDice": the mean over images of the polyp's Dice alone. Here every pixel of
the split counts alike, and the background is one of the classes; the polyp's own IoU is "iou/polyp".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from snell_scale.interfaces import IGNORED_PIXEL


def confusion_matrix(predicted: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """(classes, classes) int64: pixels by true class (row) and predicted class (column), without ignored ones.

    predicted, mask: int64 of one shape.
    """
    counted = mask != IGNORED_PIXEL
    pairs = mask[counted] * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def confusion_metrics(confusion: Tensor, class_names: Sequence[str]) -> dict[str, float]:
    """Metrics in percent: miou, mdice, pixel_accuracy, and "iou/<class>" of every class that occurs.

    A class occurs if a pixel has it or is predicted to have it; the means are over those classes alone, because
    of others neither ratio is defined (0/0). So a class that is only predicted, wrongly, counts as 0.
    ValueError: no pixel was counted.
    """
    counts = confusion.double().cpu()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    if true.sum() == 0:
        raise ValueError(
            "no pixel was evaluated: the split is empty, or all of its masks are ignored pixels "
            f"({IGNORED_PIXEL}); check the data's masks"
        )
    occurs = (true + predicted) > 0
    iou = (right / (true + predicted - right))[occurs]
    dice = (2 * right / (true + predicted))[occurs]
    present = [name for name, there in zip(class_names, occurs.tolist(), strict=True) if there]
    of_classes = {f"iou/{name}": 100 * value for name, value in zip(present, iou.tolist(), strict=True)}
    return {
        "miou": 100 * iou.mean().item(),
        "mdice": 100 * dice.mean().item(),
        "pixel_accuracy": 100 * (right.sum() / true.sum()).item(),
        **of_classes,
    }
