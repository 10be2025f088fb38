"""The embedded digits: disjoint stratified splits, labels, normalisation, reproducible shifts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import Tensor

from snell_scale.data.batches import evaluation_batches, num_samples
from snell_scale.data.embedded import DigitsConfig
from snell_scale.interfaces import Batch, DataBundle, Preprocessing, SampleKey


def config(**changes: Any) -> DigitsConfig:
    settings = {"classes": [9, 5, 6], "train_per_class": 40, "validation_per_class": 30, **changes}
    return DigitsConfig.model_validate({"name": "digits", **settings})


def whole(split: Any) -> Batch:
    return next(evaluation_batches(split, num_samples(split)))


def images(split: Any, keys: list[SampleKey]) -> Tensor:
    return split.__getitems__(keys)["image"]


def fingerprints(pictures: Tensor, labels: Tensor) -> Counter[tuple[int, bytes]]:
    return Counter((int(y), x.numpy().tobytes()) for x, y in zip(pictures, labels, strict=True))


def test_the_three_splits_together_are_exactly_the_chosen_classes() -> None:
    bundle = config().build(seed=2)
    found: Counter[tuple[int, bytes]] = Counter()
    for split in (bundle.train, bundle.validation, bundle.test):
        batch = whole(split)
        found += fingerprints(pixels(batch["image"]), batch["label"])
    raw, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    expected: Counter[tuple[int, bytes]] = Counter()
    for label, digit in enumerate((5, 6, 9)):
        originals = raw[digits == digit].view(-1, 1, 8, 8).round().to(torch.uint8)
        expected += fingerprints(originals, torch.full((len(originals),), label))
    assert found == expected  # a partition: nothing twice, nothing lost, labels in sorted order of the digits


def pixels(normalised: Tensor) -> Tensor:
    """Undo the normalisation: the original integers 0 to 16."""
    return ((normalised * 0.3760 + 0.3053) * 16).round().to(torch.uint8)


def test_splits_are_stratified_and_the_rest_is_the_test_split() -> None:
    bundle = config().build(seed=0)
    assert Counter(whole(bundle.train)["label"].tolist()) == {0: 40, 1: 40, 2: 40}
    assert Counter(whole(bundle.validation)["label"].tolist()) == {0: 30, 1: 30, 2: 30}
    # 182 fives, 181 sixes and 180 nines, less 70 each
    assert Counter(whole(bundle.test)["label"].tolist()) == {0: 112, 1: 111, 2: 110}
    assert bundle.sizes == {"train": 120, "validation": 90, "test": 333}
    assert bundle.class_names == ("5", "6", "9")


def test_fractions_are_shares_of_each_class() -> None:
    shares = {"train_per_class": None, "validation_per_class": None}
    bundle = config(train_fraction=0.5, validation_fraction=0.25, **shares).build(seed=0)
    # round(0.5·n) and round(0.25·n) of 182, 181, 180
    assert Counter(whole(bundle.train)["label"].tolist()) == {0: 91, 1: 90, 2: 90}
    assert Counter(whole(bundle.validation)["label"].tolist()) == {0: 46, 1: 45, 2: 45}


def test_the_seed_chooses_the_split_and_other_classes_do_not_change_it() -> None:
    def train_images(bundle: DataBundle, label: int) -> Tensor:
        batch = whole(bundle.train)
        return batch["image"][batch["label"] == label]

    six = train_images(config().build(seed=0), 1)
    assert torch.equal(six, train_images(config(classes=[6, 7]).build(seed=0), 0))
    assert not torch.equal(six, train_images(config().build(seed=1), 1))


def test_all_images_together_are_normalised() -> None:
    bundle = config(classes=list(range(10))).build(seed=0)
    everything = torch.cat([whole(s)["image"] for s in (bundle.train, bundle.validation, bundle.test)])
    assert len(everything) == 1797
    # the constants have four decimals
    assert abs(everything.mean()) < 1e-3
    assert abs(everything.std() - 1) < 1e-3


def test_shifts_move_training_images_by_up_to_the_stated_pixels() -> None:
    moving = config(shift_pixels=2).build(seed=0)
    still = whole(config().build(seed=0).train)["image"][:, 0]
    background = (0 - 0.3053) / 0.3760
    padded = torch.nn.functional.pad(still, [2] * 4, value=background)
    total = len(still)
    seen = set()
    for epoch in range(4):
        shifted = images(moving.train, [(index, epoch) for index in range(total)])[:, 0]
        for index, image in enumerate(shifted):
            fits = [
                (r, c)
                for r in range(5)
                for c in range(5)
                if torch.equal(image, padded[index, r : r + 8, c : c + 8])
            ]
            assert fits, "not a window into the padded original"
            seen.update(fits if len(fits) == 1 else [])
    assert seen == {(r, c) for r in range(5) for c in range(5)}


def test_a_shift_is_a_function_of_seed_index_and_epoch() -> None:
    keys = [(index, 5) for index in range(120)]
    first, again, other_seed = (config(shift_pixels=1).build(seed=s).train for s in (0, 0, 1))
    later = [(index, 6) for index in range(120)]
    assert torch.equal(images(first, keys), images(again, keys))
    assert not torch.equal(images(first, keys), images(first, later))
    assert not torch.equal(images(first, keys), images(other_seed, keys))
    shuffled = images(first, keys[::-1]).flip(0)
    assert torch.equal(images(first, keys), shuffled)


def test_validation_and_test_are_never_shifted() -> None:
    moving, still = config(shift_pixels=2).build(seed=0), config().build(seed=0)
    for name in ("validation", "test"):
        split = getattr(moving, name)
        later = images(split, [(index, 3) for index in range(num_samples(split))])
        assert torch.equal(later, whole(getattr(still, name))["image"])


def test_larger_images_are_the_same_digits_enlarged() -> None:
    bundle = config(image_size=16).build(seed=0)
    assert (bundle.input_spec.height, bundle.input_spec.width) == (16, 16)
    large, small = whole(bundle.train)["image"], whole(config().build(seed=0).train)["image"]
    # bilinear enlargement by two keeps each image's mean, but for the weights at its border
    assert torch.allclose(large.mean((1, 2, 3)), small.mean((1, 2, 3)), atol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": [3]}, "at least two different digits"),
        ({"classes": [3, 3]}, "at least two different digits"),
        ({"classes": [3, 10]}, "digits from 0 to 9"),
        ({"train_fraction": 0.5}, "exactly one of train_per_class and train_fraction"),
        ({"validation_per_class": None}, "exactly one of validation_per_class"),
        ({"image_size": 4}, "greater than or equal to 8"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_too_many_images_per_class_leave_no_test_split() -> None:
    with pytest.raises(ValueError, match="digit 5 has 182 images; 160 .* 30 for validation"):
        config(train_per_class=160).build(seed=0)


def words(texts: Sequence[str]) -> Tensor:
    """A tokenizer: the length of each text, and its last letter."""
    return torch.tensor([[len(text), ord(text[-1])] for text in texts])


def test_captions_take_turns_and_are_tokenized() -> None:
    captions = ["a handwritten {}", "{} on paper"]
    bundle = config(captions=captions).build(seed=0, preprocessing=Preprocessing(tokenize=words))
    assert bundle.captions == (
        "a handwritten five", "five on paper", "a handwritten six", "six on paper", "a handwritten nine",
        "nine on paper",
    )  # fmt: skip
    assert bundle.class_names == ("five", "six", "nine")
    assert bundle.fields == {"image", "label", "index", "caption", "image_id", "text"}
    last = num_samples(bundle.train) - 1
    sample, next_epoch = bundle.train[(last, 0)], bundle.train[(last, 1)]
    assert sample["label"] == 2
    told = [bundle.captions[int(one["caption"])] for one in (sample, next_epoch)]
    assert sorted(told) == ["a handwritten nine", "nine on paper"]
    assert torch.equal(sample["text"], words(told)[0])
    assert (int(sample["index"]), int(sample["image_id"])) == (last, last)


def test_without_a_tokenizer_there_is_no_text_and_without_captions_no_caption() -> None:
    assert config(captions=["{}"]).build(seed=0).fields == {"image", "label", "index", "caption", "image_id"}
    assert set(config().build(seed=0).train[(0, 0)]) == config().build(seed=0).fields


@pytest.mark.parametrize("caption", ["a digit", "{} or {}", "{} of {digit}"])
def test_a_caption_without_one_place_for_the_word_is_refused(caption: str) -> None:
    with pytest.raises(ValidationError, match="expected one {} in it"):
        config(captions=[caption])


def test_symmetric_images_in_three_channels_lie_in_minus_one_to_one() -> None:
    bundle = config(scaling="symmetric", channels=3, shift_pixels=1).build(seed=0)
    images = whole(bundle.train)["image"]
    assert images.shape[1] == 3
    assert torch.equal(images[:, 0], images[:, 2])
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert bundle.input_spec.mean == (0.5, 0.5, 0.5)
    standardized = whole(config(shift_pixels=1).build(seed=0).train)["image"]
    # The same images in another scale, background included; two roundings of numbers near 1.
    assert torch.allclose((images[:, :1] + 1) / 2, standardized * 0.3760 + 0.3053, atol=1e-6)
