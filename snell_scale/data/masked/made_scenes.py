"""Images with exact masks that are made, not photographed: synthetic shapes, and real digits on made backgrounds.

A scene is a function of (seed, split, index) alone. Nothing is downloaded.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from snell_scale.data.config import DataConfig, bundle_of
from snell_scale.interfaces import Batch, DataBundle, InputSpec, Preprocessing, SampleKey

SPLITS = ("train", "validation", "test")
# Part of every scene's seed, so that shapes and digits of one seed do not share their backgrounds.
_SHAPES_TAG, _DIGITS_TAG = 1, 2
_BACKGROUND = "background"
_NATIVE_SIZE = 8

Paint = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
"""(the scene's source of chance, its place in the split) → image (H, W, 3) in [0, 1], mask (H, W) of classes."""


class SceneConfig(DataConfig):
    """What made scenes have in common."""

    image_size: int = Field(default=48, ge=32, le=64, description="Pixels of the square scenes.")
    train_scenes: int = Field(gt=0)
    validation_scenes: int = Field(gt=0)
    test_scenes: int = Field(gt=0)
    objects_per_scene: tuple[int, int] = Field(default=(1, 2), description="Fewest and most.")

    @model_validator(mode="after")
    def _check_objects(self) -> "SceneConfig":
        fewest, most = self.objects_per_scene
        if not 1 <= fewest <= most:
            raise ValueError(
                f"objects_per_scene={[fewest, most]}, expected [fewest, most] with 1 <= fewest <= most"
            )
        return self

    def _bundle(self, paint: dict[str, Paint], *, seed: Sequence[int], class_names: Sequence[str]) -> DataBundle:
        sizes = {split: getattr(self, f"{split}_scenes") for split in SPLITS}
        made = {
            split: _make(paint[split], sizes[split], seed=[*seed, number]) for number, split in enumerate(SPLITS)
        }
        half = (0.5, 0.5, 0.5)
        return bundle_of(
            made,
            class_names=class_names,
            input_spec=InputSpec(3, self.image_size, self.image_size, half, half),
            fields={"image", "mask"},
        )


class ShapesConfig(SceneConfig):
    """Synthetic: discs, squares, triangles, … in random colours, places and sizes, on made textures."""

    name: Literal["shapes"] = "shapes"
    shapes: tuple[str, ...] = Field(
        default=("disc", "square", "triangle", "ring", "cross"), description="The classes, after the background."
    )

    @model_validator(mode="after")
    def _check_shapes(self) -> "ShapesConfig":
        unknown = [shape for shape in self.shapes if shape not in INSIDE]
        if unknown or not self.shapes or len(set(self.shapes)) < len(self.shapes):
            raise ValueError(f"shapes={list(self.shapes)}, expected different ones of {', '.join(INSIDE)}")
        return self

    def describe(self) -> str:
        """For the record."""
        return "shapes (synthetic)"

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """Three disjoint splits of scenes; every pixel has a class: the background or a shape."""

        def paint(rng: np.random.Generator, index: int) -> tuple[np.ndarray, np.ndarray]:
            return self._paint(rng)

        return self._bundle(
            dict.fromkeys(SPLITS, paint), seed=[seed, _SHAPES_TAG], class_names=(_BACKGROUND, *self.shapes)
        )

    def _paint(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image = texture(rng, self.image_size)
        mask = np.zeros((self.image_size, self.image_size), np.uint8)
        for _ in range(rng.integers(self.objects_per_scene[0], self.objects_per_scene[1] + 1)):
            number = int(rng.integers(len(self.shapes)))
            radius = rng.uniform(0.12, 0.24) * self.image_size
            area = INSIDE[self.shapes[number]](*_turned_grid(rng, self.image_size, radius))
            ground = image[area].mean(0) if area.any() else image.mean((0, 1))
            noise = rng.normal(0, 0.05, image.shape)
            image = np.where(area[..., None], _contrasting(rng, ground) + noise, image)
            mask[area] = number + 1
        return image, mask


class DigitScenesConfig(SceneConfig):
    """scikit-learn's real handwritten digits, coloured, enlarged and put on made textures."""

    name: Literal["digit_scenes"] = "digit_scenes"
    classes: tuple[int, ...] = Field(
        strict=False,
        default=tuple(range(10)),
        description="Digits; class 0 is the background, 1 the smallest digit.",
    )

    @model_validator(mode="after")
    def _check_classes(self) -> "DigitScenesConfig":
        if (
            not self.classes
            or len(set(self.classes)) < len(self.classes)
            or not set(self.classes) <= set(range(10))
        ):
            raise ValueError(f"classes={list(self.classes)}, expected different digits from 0 to 9")
        return self

    def describe(self) -> str:
        """For the record."""
        return "digit_scenes (real digits, made backgrounds)"

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """Three disjoint splits; a handwritten digit occurs in the scenes of one split only."""
        classes = sorted(self.classes)
        digits = digits_of_splits(classes, seed=seed)

        def painter(split: str) -> Paint:
            return lambda rng, index: self._paint(rng, digits[split])

        return self._bundle(
            {split: painter(split) for split in SPLITS},
            seed=[seed, _DIGITS_TAG],
            class_names=(_BACKGROUND, *(str(digit) for digit in classes)),
        )

    def _paint(self, rng: np.random.Generator, digits: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        image = 0.5 * texture(rng, self.image_size)  # the ink is lighter than any ground
        mask = np.zeros((self.image_size, self.image_size), np.uint8)
        for _ in range(rng.integers(self.objects_per_scene[0], self.objects_per_scene[1] + 1)):
            number = int(rng.integers(len(digits)))
            strokes = digits[number][rng.integers(len(digits[number]))]
            side = int(rng.integers(2 * self.image_size // 5, 3 * self.image_size // 5 + 1))
            ink = _enlarged(strokes, side)
            place = _free_place(rng, mask, side)
            colour = rng.uniform(0.5, 1.0, 3)
            image[place] += ink[..., None] * (colour - image[place])
            mask[place] = np.where(ink > 0.4, number + 1, mask[place])
        return image, mask


class Scenes(Dataset[Batch]):
    """Made scenes in memory. images (N, 3, H, W) uint8, masks (N, H, W) uint8; images come out in [-1, 1]."""

    def __init__(self, images: Tensor, masks: Tensor) -> None:
        self._images = images
        self._masks = masks

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: SampleKey) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        indices = torch.tensor([index for index, _ in keys])
        return {"image": self._images[indices].float() / 127.5 - 1, "mask": self._masks[indices].long()}


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) in [0, 1]: coloured noise, smooth over a random length, and a gradient of two colours."""
    coarse = torch.from_numpy(
        rng.uniform(0, 1, (1, 3, int(rng.integers(3, size // 2)), int(rng.integers(3, size // 2))))
    )
    smooth = (
        interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()
    )
    along = np.linspace(0, 1, size)
    slope = rng.uniform(-1, 1, 2)
    ramp = (along[:, None] * slope[0] + along[None] * slope[1] + 2) / 4
    first = rng.uniform(0, 1, 3)
    gradient = first + ramp[..., None] * rng.uniform(-0.5, 0.5, 3)
    share = rng.uniform(0.1, 0.4)
    return (1 - share) * gradient + share * smooth


# Shape → whether a point belongs to it; x and y in units of the shape's radius, from its middle.
INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.85,
    "triangle": lambda x, y: (y <= 0.6) & (abs(x) * 1.5 <= (y + 1.1)),
    "ring": lambda x, y: (x**2 + y**2 <= 1.1) & (x**2 + y**2 >= 0.35),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
}


def _turned_grid(rng: np.random.Generator, size: int, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, from a random middle, turned by a random angle, in units of `radius`."""
    middle = rng.uniform(radius, size - radius, 2)
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[0:size, 0:size]
    dy, dx = (rows - middle[0]) / radius, (columns - middle[1]) / radius
    return dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)


def _free_place(rng: np.random.Generator, mask: np.ndarray, side: int) -> tuple[slice, slice]:
    """Of a few random squares the one with the fewest pixels of other objects."""
    corners = rng.integers(0, len(mask) - side + 1, size=(5, 2))
    places = [(slice(top, top + side), slice(left, left + side)) for top, left in corners.tolist()]
    return min(places, key=lambda place: np.count_nonzero(mask[place]))


def _contrasting(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """A random colour that differs from `ground` (3,) visibly: the farthest of a few."""
    colours = rng.uniform(0, 1, (4, 3))
    return colours[np.abs(colours - ground).sum(1).argmax()]


def _make(paint: Paint, number: int, *, seed: Sequence[int]) -> Scenes:
    painted = [paint(np.random.default_rng([*seed, index]), index) for index in range(number)]
    images = np.stack([(255 * image.clip(0, 1)).round().astype(np.uint8) for image, _ in painted])
    return Scenes(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack([mask for _, mask in painted])),
    )


def digits_of_splits(classes: Sequence[int], *, seed: int) -> dict[str, list[np.ndarray]]:
    """Split → for each class its handwritten digits, (N, 8, 8) in [0, 1]: 60, 20 and 20 % of them.

    A class is shuffled by (seed, digit) alone, so that other classes do not change its split.
    """
    from sklearn.datasets import load_digits  # a second of import that only a run with this data needs

    images, labels = (np.asarray(array) for array in load_digits(return_X_y=True))
    splits: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for digit in classes:
        own = images[labels == digit].reshape(-1, _NATIVE_SIZE, _NATIVE_SIZE) / 16
        shuffled = np.random.default_rng([seed, digit]).permutation(own)
        parts = np.split(shuffled, [round(0.6 * len(own)), round(0.8 * len(own))])
        for split, part in zip(SPLITS, parts, strict=True):
            splits[split].append(part)
    return splits


def _enlarged(strokes: np.ndarray, side: int) -> np.ndarray:
    """(8, 8) → (side, side), how much ink there is, in [0, 1]."""
    small = torch.from_numpy(strokes)[None, None]
    return interpolate(small, size=(side, side), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1).numpy()
