"""Crops, flips and sizes of images with their masks: both move together, and chance is in the key alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from snell_scale.data.images import rng_of
from snell_scale.data.masked.transforms import (
    EvaluationTransform,
    TrainingTransform,
    distorted,
    resized_mask,
)
from snell_scale.interfaces import IGNORED_PIXEL, Batch, InputSpec

SPEC = InputSpec(3, 32, 48, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def training(
    *, resize: tuple[float, float] = (0.5, 2.0), share: float = 1.0, base: int = 32
) -> TrainingTransform:
    return TrainingTransform(
        SPEC, base_size=base, resize_range=resize, largest_share=share, flip=True, photometric=False
    )


def scene(height: int = 60, width: int = 80) -> tuple[Image.Image, np.ndarray]:
    """Blocks of 20 pixels, grey as 20 times their class: the mask can be read from the image."""
    rows, columns = np.mgrid[0:height, 0:width] // 20
    mask = (rows * 4 + columns).astype(np.uint8)
    return Image.fromarray(20 * mask).convert("RGB"), mask


def classes_seen(sample: Batch) -> torch.Tensor:
    """The class that each pixel's colour shows."""
    red = sample["image"][0] * SPEC.std[0] + SPEC.mean[0]
    return red * 255 / 20


@pytest.mark.parametrize("index", range(12))
def test_image_and_mask_stay_together(index: int) -> None:
    sample = training()(*scene(), rng_of(0, (index, 0)))
    assert sample["image"].shape == (3, 32, 48)
    assert sample["mask"].shape == (32, 48)
    labelled = sample["mask"] != IGNORED_PIXEL
    difference = (classes_seen(sample) - sample["mask"])[labelled].abs()
    # Smoothing blurs the borders of blocks; a crop or flip of one alone would spoil nearly all pixels.
    assert (difference < 0.1).float().mean() > 0.6
    assert difference.median() < 0.05
    assert (sample["image"][:, ~labelled] == 0).all()


def test_small_images_are_padded_with_the_mean_and_ignored() -> None:
    sample = training(resize=(0.5, 0.5))(*scene(), rng_of(0, (0, 0)))
    # The shorter side becomes 16, the longer one 21.
    ignored = sample["mask"] == IGNORED_PIXEL
    assert not ignored[:16, :21].any()
    assert ignored[16:].all()
    assert ignored[:, 21:].all()


def test_samples_are_a_function_of_their_key_and_touch_no_global_generator() -> None:
    before = torch.get_rng_state()
    transform = TrainingTransform(SPEC, 32, (0.5, 2.0), 0.75, flip=True, photometric=True)
    first, again, later = (transform(*scene(), rng_of(0, key)) for key in ((3, 1), (3, 1), (3, 2)))
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["mask"], again["mask"])
    assert not torch.equal(first["image"], later["image"])
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_of_one_class_are_drawn_again() -> None:
    """Left half and right half are classes: a crop of 48 has at least a quarter of both in 24 of 253 places."""
    mask = np.zeros((200, 300), np.uint8)
    mask[:, :150] = 1
    mask[:5] = IGNORED_PIXEL
    image = Image.fromarray(mask).convert("RGB")

    def share_of_mixed(share: float) -> float:
        transform = training(resize=(1.0, 1.0), share=share, base=200)
        crops = [transform(image, mask, rng_of(0, (index, 0)))["mask"] for index in range(60)]
        counts = [torch.bincount(crop[crop < 2], minlength=2) for crop in crops]
        return sum(bool(count.max() < 0.75 * count.sum()) for count in counts) / len(counts)

    # 9 % of the crops at first, 1 - 0.91^10 = 62 % of those that get ten tries; of 60, within four deviations.
    assert share_of_mixed(1.0) < 0.25
    assert share_of_mixed(0.75) > 0.38


def test_masks_are_resized_to_the_nearest_middle() -> None:
    mask = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    # Middles of the two new pixels lie between 0|1 and 2|3; torch takes the right one. Corners: 0 and 2.
    assert resized_mask(mask, (1, 2)).tolist() == [[1, 3]]
    assert resized_mask(mask, (2, 4)).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("resizing", "size", "masks", "image_size", "mask_size"),
    [
        ("keep_ratio", 30, "original", (30, 40), (60, 80)),
        ("keep_ratio", 30, "resized", (30, 40), (30, 40)),
        ("squash", 30, "original", (32, 48), (60, 80)),
        ("none", 30, "resized", (60, 80), (60, 80)),
    ],
)
def test_sizes_of_evaluation(
    resizing: str, size: int, masks: str, image_size: tuple[int, int], mask_size: tuple[int, int]
) -> None:
    transform = EvaluationTransform(SPEC, resizing, size, masks)  # pyright: ignore[reportArgumentType]
    image, mask = scene()
    sample = transform(image, mask, rng_of(0, (0, 0)))
    assert tuple(sample["image"].shape) == (3, *image_size)
    assert tuple(sample["mask"].shape) == mask_size
    assert tuple(sample["image_size"].tolist()) == image_size
    assert tuple(sample["mask_size"].tolist()) == mask_size


def test_a_long_image_is_not_enlarged_beyond_four_times_the_shorter_side() -> None:
    image, mask = scene(10, 200)
    sample = EvaluationTransform(SPEC, "keep_ratio", 32, "resized")(image, mask, rng_of(0, (0, 0)))
    # As mmseg's (2048, 512): the longer side to 128, not the shorter to 32, which would make it 640.
    assert tuple(sample["image"].shape[1:]) == (6, 128)


def test_pixels_are_normalised() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 51))
    sample = EvaluationTransform(SPEC, "none", 4, "original")(
        image, np.zeros((4, 4), np.uint8), rng_of(0, (0, 0))
    )
    assert sample["image"][:, 0, 0].tolist() == pytest.approx([0.5 / 0.2, -0.4 / 0.25, -0.1 / 0.5], rel=1e-6)


def test_distortion_changes_colours_within_the_published_bounds() -> None:
    grey, red = Image.new("L", (4, 4), 100), Image.new("RGB", (4, 4), (200, 50, 50))
    values = {np.asarray(distorted(grey, rng_of(0, (i, 0))))[0, 0] for i in range(200)}
    # (100 ± 32) x (0.5 to 1.5); half of the time not shifted, half of the time not scaled.
    assert 34 <= min(values) < 50
    assert 150 < max(values) <= 198
    assert 100 in values
    hues = [np.asarray(distorted(red, rng_of(0, (i, 0))).convert("HSV"))[0, 0, 0] for i in range(200)]
    turns = [min(int(hue), 256 - int(hue)) for hue in hues]
    # 36° are 25.6 of Pillow's 256 steps; the way to RGB and back rounds.
    assert 15 < max(turns) <= 28
    assert turns.count(0) > 60
