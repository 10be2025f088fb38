"""Data that comes with the installation: scikit-learn's handwritten digits, nothing to download."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset

from snell_scale.data.config import DataConfig, bundle_of
from snell_scale.interfaces import Batch, DataBundle, InputSpec, Preprocessing, SampleKey

# (mean, std) in [0, 1]. Standardized: of all 1,797 images, so that models of different classes and splits see one
# scale; symmetric: [-1, 1], as models that generate images have it.
_SCALINGS = {"standardized": (0.3053, 0.3760), "symmetric": (0.5, 0.5)}
_NATIVE_SIZE = 8
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class DigitsConfig(DataConfig):
    """scikit-learn's 1,797 handwritten 8x8 digits, real images that need no download."""

    name: Literal["digits"] = "digits"
    classes: tuple[int, ...] = Field(
        strict=False, description="Digits to tell apart, e.g. [5, 6, 7, 8, 9]; label 0 is the smallest of them."
    )
    image_size: int = Field(
        default=_NATIVE_SIZE, ge=_NATIVE_SIZE, description="Pixels; above 8 by bilinear enlargement."
    )
    train_per_class: int | None = Field(default=None, gt=0)
    train_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of each class; or train_per_class."
    )
    validation_per_class: int | None = Field(default=None, gt=0)
    validation_fraction: float | None = Field(default=None, gt=0, lt=1, description="Or validation_per_class.")
    shift_pixels: int = Field(default=0, ge=0, description="Training images move up to so many pixels each way.")
    channels: Literal[1, 3] = Field(default=1, description="3: the grey image three times, for models of colour.")
    scaling: Literal["standardized", "symmetric"] = Field(
        default="standardized", description="symmetric: [-1, 1], for models that generate images."
    )
    captions: tuple[str, ...] = Field(
        default=(),
        description="Sentences with {} for the digit's word, which the images get in turn: ['a handwritten {}'].",
    )

    @model_validator(mode="after")
    def _check(self) -> "DigitsConfig":
        if len(set(self.classes)) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes={list(self.classes)}, expected at least two different digits")
        if not set(self.classes) <= set(range(10)):
            raise ValueError(f"classes={list(self.classes)}, expected digits from 0 to 9")
        for split in ("train", "validation"):
            count, fraction = getattr(self, f"{split}_per_class"), getattr(self, f"{split}_fraction")
            if (count is None) == (fraction is None):
                raise ValueError(f"give exactly one of {split}_per_class and {split}_fraction")
        wrong = [text for text in self.captions if [text.count(part) for part in ("{}", "{", "}")] != [1, 1, 1]]
        if wrong:
            raise ValueError(f"captions has {wrong[0]!r}, expected one {{}} in it, where the digit's word goes")
        return self

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """Three disjoint stratified splits chosen by `seed`; what train and validation leave is the test split.

        ValueError if a class has too few images to leave one for each split.
        """
        images, labels = _load_digits(self.image_size)
        classes = sorted(self.classes)
        splits: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
        for digit in classes:
            parts = self._split(np.flatnonzero(labels == digit), digit=digit, seed=seed)
            for split, part in zip(splits.values(), parts, strict=True):
                split.append(part)
        captions = tuple(text.format(_WORDS[digit]) for digit in classes for text in self.captions)
        tokenize = preprocessing.tokenize if preprocessing else None
        texts = tokenize(captions) if tokenize and captions else None
        mean, std = _SCALINGS[self.scaling]
        datasets = {
            name: DigitsSplit(
                (images[np.concatenate(parts)] - mean) / std,
                torch.from_numpy(np.repeat(np.arange(len(parts)), [len(part) for part in parts])),
                background=(0.0 - mean) / std,
                channels=self.channels,
                shift_pixels=self.shift_pixels if name == "train" else 0,
                seed=seed,
                captions_per_class=len(self.captions),
                texts=texts,
            )
            for name, parts in splits.items()
        }
        fields = {"image", "label", "index"}
        fields |= {"caption", "image_id"} if captions else set()
        return bundle_of(
            datasets,
            class_names=[_WORDS[digit] if captions else str(digit) for digit in classes],
            input_spec=InputSpec(
                self.channels, self.image_size, self.image_size, (mean,) * self.channels, (std,) * self.channels
            ),
            fields=fields | ({"text"} if texts is not None else set()),
            captions=captions,
        )

    def _split(self, indices: np.ndarray, *, digit: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One class's images, shuffled by (seed, digit) alone, so that other classes do not change its split."""
        total = len(indices)
        num_train = self.train_per_class or round((self.train_fraction or 0) * total)
        num_validation = self.validation_per_class or round((self.validation_fraction or 0) * total)
        if min(num_train, num_validation, total - num_train - num_validation) < 1:
            raise ValueError(
                f"data: digit {digit} has {total} images; {num_train} for training and {num_validation} for "
                "validation do not leave at least one for each split; change data.train_* or data.validation_*"
            )
        shuffled = np.random.default_rng([seed, digit]).permutation(indices)
        train, validation, test = np.split(shuffled, [num_train, num_train + num_validation])
        return train, validation, test


class DigitsSplit(Dataset[Batch]):
    """Images and labels of one split, in memory; looked up by (index, epoch), one by one or many at once.

    images: (N, H, W) float32, normalised; labels: (N,) int64; background: the value outside of an image; texts:
    (classes x captions_per_class, length) int64. Samples: see `DataBundle.fields`. Captions take turns, a class's
    next one with every index and epoch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        background: float,
        channels: int,
        shift_pixels: int,
        seed: int,
        captions_per_class: int = 0,
        texts: Tensor | None = None,
    ) -> None:
        self.labels = labels
        self._size = images.shape[-1]
        self._channels = channels
        self._reach = shift_pixels
        self._seed = seed
        self._captions_per_class = captions_per_class
        self._texts = texts
        # What moves in from outside is background, as it is around every digit.
        self._padded = pad(images, [shift_pixels] * 4, value=background)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: SampleKey) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        """The samples stacked, not as a list: collating thousands of tiny images costs more than the images."""
        indices = torch.tensor([index for index, _ in keys])
        images = self._images(keys, indices).unsqueeze(1).expand(-1, self._channels, -1, -1)
        return {"image": images, "label": self.labels[indices], "index": indices, **self._captions(keys, indices)}

    def _images(self, keys: Sequence[SampleKey], indices: Tensor) -> Tensor:
        if self._reach == 0:
            return self._padded[indices]
        corners = torch.tensor(
            [_corners(self._seed, epoch, len(self), self._reach)[index] for index, epoch in keys]
        )
        window = torch.arange(self._size)
        rows = (corners[:, :1] + window).unsqueeze(2)
        columns = (corners[:, 1:] + window).unsqueeze(1)
        return self._padded[indices[:, None, None], rows, columns]

    def _captions(self, keys: Sequence[SampleKey], indices: Tensor) -> Batch:
        if not self._captions_per_class:
            return {}
        turns = torch.tensor([(index + epoch) % self._captions_per_class for index, epoch in keys])
        caption = self.labels[indices] * self._captions_per_class + turns
        told = {"caption": caption, "image_id": indices}
        return told if self._texts is None else {**told, "text": self._texts[caption]}


@lru_cache(maxsize=4)
def _corners(seed: int, epoch: int, total: int, reach: int) -> list[tuple[int, int]]:
    """Where each sample's window into its padded image starts in this epoch: (row, column) in [0, 2·reach]."""
    drawn = np.random.default_rng([seed, epoch]).integers(0, 2 * reach + 1, size=(total, 2))
    return [(row, column) for row, column in drawn.tolist()]


def _load_digits(size: int) -> tuple[Tensor, np.ndarray]:
    """(images (1797, size, size) float32 in [0, 1], labels (1797,))."""
    from sklearn.datasets import load_digits  # a second of import that only a run with this data needs

    images, labels = (np.asarray(array) for array in load_digits(return_X_y=True))
    scaled = torch.from_numpy(images).float().view(-1, 1, _NATIVE_SIZE, _NATIVE_SIZE) / 16
    if size != _NATIVE_SIZE:
        scaled = interpolate(scaled, size=(size, size), mode="bilinear", align_corners=False)
    return scaled.squeeze(1), labels
