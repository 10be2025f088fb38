"""Segmentation: losses and metrics against counts by hand; padded batches; what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassJaccardIndex

from snell_scale.interfaces import IGNORED_PIXEL, Batch, DataBundle, InputSpec, ModelBundle, SampleKey
from snell_scale.tasks.confusion import confusion_matrix, confusion_metrics
from snell_scale.tasks.segmentation import Segmentation, SegmentationConfig, dice_loss, pixel_cross_entropy
from snell_scale.tasks.sliding_window import window_starts

NAMES = ("background", "wall", "door", "lamp")
SPEC = InputSpec(3, 8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Empty(Dataset[Batch]):
    """No samples."""

    def __getitem__(self, key: SampleKey) -> Batch:
        raise IndexError(key)


class Pixelwise(nn.Module):
    """A local model: a pixel's logits are whole-numbered multiples of its own values. Remembers its calls."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0 * classes).view(classes, 3) - classes)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.shapes.append(tuple(image.shape))
        return torch.einsum("kc,bchw->bkhw", self.weight, image)


def bundles(names: tuple[str, ...] = NAMES, *, output: Any = "pixel_logits") -> tuple[DataBundle, ModelBundle]:
    data = DataBundle(Empty(), Empty(), Empty(), names, SPEC, fields=frozenset({"image", "mask"}))
    return data, ModelBundle(nn.Identity(), (), {}, {}, (), SPEC, output=output)


def task_of(names: tuple[str, ...] = NAMES, **settings: Any) -> Segmentation:
    data, model = bundles(names)
    return SegmentationConfig.model_validate({"name": "segmentation", **settings}).build(data=data, model=model)


def example(*, images: int = 3, size: tuple[int, int] = (6, 7), classes: int = 4, seed: int = 0) -> Batch:
    """Small whole numbers as pixels, every class and some ignored pixels in the masks."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, classes + 1, (images, *size))
    mask[mask == classes] = IGNORED_PIXEL
    image = rng.integers(-3, 4, (images, 3, *size)).astype(np.float32)
    return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask)}


def metrics_of(task: Segmentation, model: nn.Module, *batches: Batch) -> dict[str, float]:
    evaluation = task.evaluation(model, Empty())
    for batch in batches:
        evaluation.add(model, batch)
    return evaluation.metrics(evaluation.sums())


def test_the_loss_is_the_sum_over_labelled_pixels_divided_by_all_pixels() -> None:
    batch = example()
    logits = Pixelwise()(batch["image"]).detach()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0])
    total = 0.0
    for image, row, column in np.ndindex(*batch["mask"].shape):
        label = int(batch["mask"][image, row, column])
        if label != IGNORED_PIXEL:
            values = logits[image, :, row, column].double().tolist()
            largest = max(values)
            normaliser = largest + math.log(sum(math.exp(value - largest) for value in values))
            total += weights[label].item() * (normaliser - values[label])
    loss = pixel_cross_entropy(logits, batch["mask"], class_weights=weights)
    # float32 sums of 126 numbers against Python's float64
    assert loss.item() == pytest.approx(total / batch["mask"].numel(), rel=1e-5)


def test_class_weights_are_given_by_name() -> None:
    batch, model = example(), Pixelwise()
    task = task_of(class_weights={"door": 3.0})
    expected = pixel_cross_entropy(
        model(batch["image"]), batch["mask"], class_weights=torch.tensor([1.0, 1, 3, 1])
    )
    assert torch.equal(task(model, batch)["loss"], expected)
    with pytest.raises(ValueError, match="'roof', which is no class of the data: background, wall, door, lamp"):
        task_of(class_weights={"roof": 1.0})


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_a_batch_without_a_labelled_pixel_has_loss_and_gradient_zero(dice_weight: float) -> None:
    batch, model = example(), Pixelwise()
    batch["mask"].fill_(IGNORED_PIXEL)
    loss = task_of(dice_weight=dice_weight)(model, batch)["loss"]
    loss.backward()
    assert loss.item() == 0.0
    assert model.weight.grad is not None
    assert torch.count_nonzero(model.weight.grad) == 0


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_the_loss_of_a_step_does_not_depend_on_who_has_which_samples(dice_weight: float) -> None:
    batch, model = example(images=4), Pixelwise()
    batch["mask"][0] = IGNORED_PIXEL  # shares with different numbers of labelled pixels
    task = task_of(dice_weight=dice_weight)
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    mean = sum(task(model, half)["loss"].item() for half in halves) / 2
    # float32 sums in another order
    assert mean == pytest.approx(task(model, batch)["loss"].item(), rel=1e-6)


def test_auxiliary_logits_count_with_their_weight() -> None:
    class WithAuxiliary(Pixelwise):
        def forward(self, image: Tensor) -> Any:
            logits = super().forward(image)
            return logits, (2 * logits, 3 * logits)

    batch = example()
    logits = Pixelwise()(batch["image"])
    parts = [pixel_cross_entropy(factor * logits, batch["mask"]).item() for factor in (1, 2, 3)]
    output = task_of(auxiliary_weight=0.4)(WithAuxiliary(), batch)
    assert output["loss"].item() == pytest.approx(parts[0] + 0.4 * (parts[1] + parts[2]), rel=1e-6)
    assert torch.equal(output["outputs"], logits)


def test_dice_loss_by_hand() -> None:
    mask = torch.tensor([[[1, 0], [1, IGNORED_PIXEL]], [[0, 0], [0, 0]]])
    foreground = torch.tensor([[[0.8, 0.4], [0.6, 0.9]], [[0.1, 0.2], [0.3, 0.4]]])
    logits = torch.stack([1 - foreground, foreground], dim=1).log()
    with_polyp = 1 - (2 * (0.8 + 0.6) + 1) / (0.8 + 0.4 + 0.6 + 2 + 1)
    without = 1 - 1 / (0.1 + 0.2 + 0.3 + 0.4 + 1)
    # softmax of logarithms in float32
    assert dice_loss(logits, mask).item() == pytest.approx((with_polyp + without) / 2, rel=1e-6)


def test_metrics_by_hand_with_ignored_pixels_absent_and_invented_classes() -> None:
    i = IGNORED_PIXEL
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, i, i]])
    found = torch.tensor([[0, 0, 1, 1], [1, 2, 2, 0]])
    confusion = confusion_matrix(found, truth, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]  # row: the true class
    metrics = confusion_metrics(confusion, NAMES)
    # background: 2 of 3; wall: 2 of 4; door: predicted once, never true: 0 of 1; lamp: neither, in no mean.
    assert metrics == pytest.approx(
        {
            "miou": 100 * (2 / 3 + 2 / 4 + 0) / 3,
            "mdice": 100 * (4 / 5 + 4 / 6 + 0) / 3,
            "pixel_accuracy": 100 * 4 / 6,
            "iou/background": 100 * 2 / 3,
            "iou/wall": 50.0,
            "iou/door": 0.0,
        },
        rel=1e-12,
    )
    assert "iou/lamp" not in metrics


def test_miou_is_torchmetrics_jaccard_index_over_the_whole_split() -> None:
    model, batches = Pixelwise(), [example(seed=seed, classes=3) for seed in (1, 2)]
    other = MulticlassJaccardIndex(num_classes=4, ignore_index=IGNORED_PIXEL)
    for batch in batches:
        other.update(model(batch["image"]).argmax(1), batch["mask"])
    # torchmetrics divides in float32
    assert metrics_of(task_of(), model, *batches)["miou"] == pytest.approx(100 * other.compute().item(), rel=1e-6)


def test_a_split_without_a_labelled_pixel_is_refused() -> None:
    batch = example()
    batch["mask"].fill_(IGNORED_PIXEL)
    with pytest.raises(ValueError, match="no pixel was evaluated"):
        metrics_of(task_of(), Pixelwise(), batch)


def test_sums_of_shares_are_those_of_the_whole() -> None:
    task, model, batch = task_of(), Pixelwise(), example(images=4)
    shares = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    sums = []
    for part in (batch, *shares):
        evaluation = task.evaluation(model, Empty())
        evaluation.add(model, part)
        sums.append(evaluation.sums())
    whole, first, second = sums
    assert torch.equal(first["confusion"] + second["confusion"], whole["confusion"])
    assert whole["confusion"].dtype == torch.int64
    assert whole["confusion"].sum() == (batch["mask"] != IGNORED_PIXEL).sum()
    # float64 sums in another order
    assert (first["loss_sum"] + second["loss_sum"]).item() == pytest.approx(whole["loss_sum"].item(), rel=1e-12)


def test_a_batch_that_does_not_count_adds_nothing() -> None:
    task, model = task_of(), Pixelwise()
    evaluation = task.evaluation(model, Empty())
    evaluation.add(model, example(), counts=False)
    assert evaluation.sums()["confusion"].sum() == 0


def test_a_padded_batch_of_different_sizes_is_evaluated_sample_by_sample() -> None:
    first, second = example(images=1, size=(6, 7)), example(images=1, size=(4, 9), seed=1)
    second["mask"] = second["mask"][:, :3, :5]  # a mask of another size than its image
    padded: Batch = {"image": torch.full((2, 3, 6, 9), 100.0), "mask": torch.zeros(2, 6, 7, dtype=torch.int64)}
    sizes = [(part["image"].shape[-2:], part["mask"].shape[-2:]) for part in (first, second)]
    for place, (part, (image, mask)) in enumerate(zip((first, second), sizes, strict=True)):
        padded["image"][place, :, : image[0], : image[1]] = part["image"][0]
        padded["mask"][place, : mask[0], : mask[1]] = part["mask"][0]
    padded["image_size"] = torch.tensor([list(image) for image, _ in sizes])
    padded["mask_size"] = torch.tensor([list(mask) for _, mask in sizes])
    alone = metrics_of(task_of(), Pixelwise(), first, second)
    assert metrics_of(task_of(), Pixelwise(), padded) == pytest.approx(alone, rel=1e-12)


def test_the_window_follows_the_model_and_a_wide_stride_is_refused() -> None:
    batch, model = example(size=(20, 8)), Pixelwise()
    metrics_of(task_of(inference="sliding", windows_per_forward=1), model, batch)
    assert {shape[2:] for shape in model.shapes} == {(8, 8)}
    assert len(model.shapes) == 3 * len(window_starts(20, 8, 6))  # two thirds of 8, rounded up
    with pytest.raises(ValueError, match="task.stride=9 is above the window's 8x8"):
        task_of(inference="sliding", stride=9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 4}, "belong to sliding inference"),
        ({"inference": "sliding", "window": 4, "stride": 5}, "pixels between would be unseen"),
        ({"scales": [1.0, 0.0]}, "expected positive factors"),
        ({"class_weights": {"wall": -1.0}}, "factors of at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(**settings)


def test_other_data_and_models_are_refused() -> None:
    data, model = bundles()
    labels = DataBundle(Empty(), Empty(), Empty(), NAMES, SPEC)
    with pytest.raises(ValueError, match="needs data with mask"):
        SegmentationConfig().build(data=labels, model=model)
    with pytest.raises(ValueError, match="needs a model that gives pixel_logits"):
        SegmentationConfig().build(data=data, model=bundles(output="class_logits")[1])
    with pytest.raises(ValueError, match="expected 2 to 255"):
        task_of(("only",))
