"""Made scenes: exact masks, splits apart, digits of one split only, no chance beyond (seed, split, index)."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from snell_scale.data.batches import num_samples
from snell_scale.data.masked.made_scenes import INSIDE, SPLITS, DigitScenesConfig, ShapesConfig, digits_of_splits
from snell_scale.interfaces import Batch, DataBundle

SIZES = {"train_scenes": 12, "validation_scenes": 5, "test_scenes": 6}


def shapes(**settings: Any) -> ShapesConfig:
    return ShapesConfig.model_validate({**SIZES, **settings})


def digit_scenes(**settings: Any) -> DigitScenesConfig:
    return DigitScenesConfig.model_validate({**SIZES, **settings})


def whole(bundle: DataBundle, split: str) -> Batch:
    data: Any = getattr(bundle, split)
    return data.__getitems__([(index, 0) for index in range(num_samples(data))])


@pytest.mark.parametrize("config", [shapes(image_size=40), digit_scenes(image_size=40, classes=[7, 2])])
def test_samples_are_as_the_bundle_says(config: ShapesConfig | DigitScenesConfig) -> None:
    bundle = config.build(seed=3)
    assert bundle.sizes == {"train": 12, "validation": 5, "test": 6}
    assert bundle.fields == {"image", "mask"}
    for split in SPLITS:
        batch = whole(bundle, split)
        assert batch["image"].shape == (bundle.sizes[split], 3, 40, 40)
        assert batch["mask"].shape == (bundle.sizes[split], 40, 40)
        assert (batch["image"].dtype, batch["mask"].dtype) == (torch.float32, torch.int64)
        assert batch["image"].abs().max() <= 1
        assert batch["mask"].min() >= 0
        assert batch["mask"].max() < len(bundle.class_names)
        assert torch.equal(getattr(bundle, split)[(2, 9)]["image"], batch["image"][2])


@pytest.mark.parametrize("make", [shapes, digit_scenes])
def test_scenes_are_a_function_of_seed_split_and_index(make: Any) -> None:
    first, again, other = make().build(seed=1), make().build(seed=1), make().build(seed=2)
    longer = make(train_scenes=20).build(seed=1)
    for split in SPLITS:
        assert torch.equal(whole(first, split)["image"], whole(again, split)["image"])
    assert torch.equal(whole(longer, "train")["image"][:12], whole(first, "train")["image"])
    assert not torch.equal(whole(other, "train")["image"], whole(first, "train")["image"])
    seen = torch.cat([whole(first, split)["image"] for split in SPLITS])
    assert len(seen.flatten(1).unique(dim=0)) == len(seen)


def test_every_shape_occurs_and_its_mask_is_its_outline() -> None:
    bundle = shapes(train_scenes=60, objects_per_scene=[1, 1]).build(seed=0)
    assert bundle.class_names == ("background", "disc", "square", "triangle", "ring", "cross")
    batch = whole(bundle, "train")
    for number, name in enumerate(bundle.class_names[1:], start=1):
        masks = [mask == number for mask in batch["mask"] if bool((mask == number).any())]
        assert masks
        # A circle of the radius that holds the shape: the share of it that the shape fills, from its formula.
        side = np.linspace(-1.5, 1.5, 301)
        area = INSIDE[name](*np.meshgrid(side, side)).mean() * 9
        for mask in masks:
            radius = (mask.sum().item() / area) ** 0.5
            assert 0.12 * 48 - 0.5 <= radius <= 0.24 * 48 + 0.5  # the radii drawn from, within half a pixel


def test_the_object_differs_from_its_ground() -> None:
    batch = whole(shapes(objects_per_scene=[1, 1]).build(seed=0), "train")
    for image, mask in zip(batch["image"], batch["mask"], strict=True):
        inside, outside = image[:, mask > 0].mean(1), image[:, mask == 0].mean(1)
        assert (inside - outside).abs().sum() > 0.3  # of 6: images are in [-1, 1]


def test_digits_are_disjoint_between_splits_and_do_not_depend_on_the_other_classes() -> None:
    splits = digits_of_splits([2, 7], seed=0)
    flat = {split: {digit.tobytes() for part in parts for digit in part} for split, parts in splits.items()}
    assert not flat["train"] & flat["validation"]
    assert not flat["train"] & flat["test"]
    assert not flat["validation"] & flat["test"]
    assert sum(len(part) for parts in splits.values() for part in parts) == 177 + 179  # all twos and sevens
    assert np.array_equal(digits_of_splits([7], seed=0)["test"][0], splits["test"][1])


def test_a_digit_scenes_mask_is_where_the_ink_is() -> None:
    bundle = digit_scenes(classes=[1, 8], objects_per_scene=[1, 1]).build(seed=0)
    assert bundle.class_names == ("background", "1", "8")
    batch = whole(bundle, "train")
    assert set(batch["mask"].unique().tolist()) == {0, 1, 2}
    for image, mask in zip(batch["image"], batch["mask"], strict=True):
        assert spread(image[:, mask > 0]) < spread(image[:, mask == 0]) + 0.35  # ink is of one colour


def spread(pixels: Tensor) -> float:
    return pixels.std(dim=1).mean().item()


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (shapes, {"shapes": ["disc", "star"]}, "expected different ones of disc, square"),
        (shapes, {"objects_per_scene": [2, 1]}, "fewest, most"),
        (digit_scenes, {"classes": [1, 1]}, "expected different digits from 0 to 9"),
        (digit_scenes, {"classes": [10]}, "expected different digits from 0 to 9"),
        (digit_scenes, {"image_size": 16}, "greater than or equal to 32"),
    ],
)
def test_mistakes_are_named(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)
