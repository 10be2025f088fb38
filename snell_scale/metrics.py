"""What every metric is called in print, and which way is better: the one place that says so (no torch)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """label: with its unit, as in a table's heading."""

    label: str
    higher_is_better: bool = True
    digits: int = 1


METRICS: dict[str, Metric] = {
    "loss": Metric("loss", higher_is_better=False, digits=4),
    # Classification.
    "top1": Metric("top-1 %"),
    "top5": Metric("top-5 %"),
    # Segmentation, over the whole split's pixels.
    "miou": Metric("mIoU %"),
    "mdice": Metric("mDice %"),
    "pixel_accuracy": Metric("pixel accuracy %"),
    "iou": Metric("IoU %"),
    # Images and texts.
    "zero_shot_top1": Metric("zero-shot top-1 %"),
    "zero_shot_top5": Metric("zero-shot top-5 %"),
    "image_to_text_recall1": Metric("image→text R@1 %"),
    "image_to_text_recall5": Metric("image→text R@5 %"),
    "image_to_text_recall10": Metric("image→text R@10 %"),
    "text_to_image_recall1": Metric("text→image R@1 %"),
    "text_to_image_recall5": Metric("text→image R@5 %"),
    "text_to_image_recall10": Metric("text→image R@10 %"),
    # Generation; the backend that made the features stands in the record.
    "fid": Metric("FID", higher_is_better=False, digits=2),
    "kid": Metric("KID ×1000", higher_is_better=False, digits=2),
    "sample_accuracy": Metric("samples recognised %"),
    "clip_i": Metric("CLIP-I", digits=3),
    "clip_t": Metric("CLIP-T", digits=3),
    "dino": Metric("DINO similarity", digits=3),
}


def metric(name: str) -> Metric:
    """The metric of that name; one of a class ("iou/wall") is its family's, with the class in its label."""
    family, _, member = name.partition("/")
    found = METRICS.get(family, Metric(family))
    return Metric(f"{found.label} {member}", found.higher_is_better, found.digits) if member else found


def is_better(name: str, value: float, than: float) -> bool:
    """Whether `value` beats `than` in this metric."""
    return value > than if metric(name).higher_is_better else value < than
