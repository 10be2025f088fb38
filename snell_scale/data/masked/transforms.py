"""From a decoded image and its mask to a sample: random size, crop, flip and colours, or a size for evaluation.

The published pipeline of mmseg's ADE20K recipes, by torchvision's functions; every random number comes from the
generator that is handed in, so that a sample is a function of its key.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from snell_scale.interfaces import IGNORED_PIXEL, Batch, InputSpec

Resizing = Literal["keep_ratio", "squash", "none"]
MaskSize = Literal["original", "resized"]

# How many times the size of the shorter side the longer one may have: 2048 x 512 is published.
_LONGEST = 4
_CROP_TRIES = 10


@dataclass(frozen=True)
class TrainingTransform:
    """Random resize, crop, flip, colours; then normalise and pad to `spec`'s size.

    base_size: pixels of the shorter side at factor 1; resize_range: the factors; largest_share: a crop is drawn
    again (up to ten times) while one class has at least this share of its labelled pixels.
    """

    spec: InputSpec
    base_size: int
    resize_range: tuple[float, float]
    largest_share: float
    flip: bool
    photometric: bool

    def __call__(self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator) -> Batch:
        """mask: (H, W) uint8 → {"image": (C, h, w) float32, "mask": (h, w) int64} of spec's size."""
        factor = rng.uniform(*self.resize_range) * _factor(image, self.base_size)
        size = _scaled(image, factor)
        image, classes = resized_image(image, size, self.spec), resized_mask(torch.from_numpy(mask), size)
        top, left = self._corner(classes, rng)
        bottom, right = min(top + self.spec.height, size[0]), min(left + self.spec.width, size[1])
        image, classes = image.crop((left, top, right, bottom)), classes[top:bottom, left:right]
        if self.flip and rng.random() < 0.5:
            image, classes = ImageOps.mirror(image), classes.flip(-1)
        if self.photometric:
            image = distorted(image, rng)
        missing = (0, self.spec.width - (right - left), 0, self.spec.height - (bottom - top))
        # 0 is the mean colour after normalisation.
        return {
            "image": pad(normalised(image, self.spec), missing),
            "mask": pad(classes.long(), missing, value=IGNORED_PIXEL),
        }

    def _corner(self, mask: Tensor, rng: np.random.Generator) -> tuple[int, int]:
        height, width = mask.shape
        bounds = (max(height - self.spec.height, 0) + 1, max(width - self.spec.width, 0) + 1)
        top, left = 0, 0
        for _ in range(_CROP_TRIES):
            top, left = (int(rng.integers(bound)) for bound in bounds)
            crop = mask[top : top + self.spec.height, left : left + self.spec.width]
            if self.largest_share >= 1 or _is_mixed(crop, self.largest_share):
                break
        return top, left


@dataclass(frozen=True)
class EvaluationTransform:
    """No chance in it. The mask keeps its size, as published, unless it is to be `resized` with the image."""

    spec: InputSpec
    resizing: Resizing
    size: int
    masks: MaskSize

    def __call__(self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator) -> Batch:
        """→ image and mask, and their sizes (2,) int64, for they may differ from sample to sample."""
        classes = torch.from_numpy(mask)
        if self.resizing == "squash":
            image = resized_image(image, (self.spec.height, self.spec.width), self.spec)
        elif self.resizing == "keep_ratio":
            image = resized_image(image, _scaled(image, _factor(image, self.size)), self.spec)
        if self.masks == "resized":
            classes = resized_mask(classes, (image.height, image.width))
        return {
            "image": normalised(image, self.spec),
            "mask": classes.long(),
            "image_size": torch.tensor([image.height, image.width]),
            "mask_size": torch.tensor(classes.shape),
        }


def resized_image(image: Image.Image, size: tuple[int, int], spec: InputSpec) -> Image.Image:
    """size: (height, width). Pillow's filters, which smooth when they shrink."""
    if (image.height, image.width) == size:
        return image
    mode = InterpolationMode(spec.interpolation)
    return cast(Image.Image, transforms.resize(cast(Any, image), list(size), interpolation=mode))


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) → size, each pixel a copy of the one at its middle.

    torchvision's own rule for masks rounds corners down instead, which moves them half a pixel against the image.
    """
    if tuple(mask.shape) == size:
        return mask
    nearest = InterpolationMode.NEAREST_EXACT
    return transforms.resize(mask.unsqueeze(0), list(size), interpolation=nearest).squeeze(0)


def normalised(image: Image.Image, spec: InputSpec) -> Tensor:
    """(C, H, W) float32."""
    pixels = torch.from_numpy(np.atleast_3d(np.array(image, dtype=np.float32))).permute(2, 0, 1) / 255
    return transforms.normalize(pixels, list(spec.mean), list(spec.std))


def distorted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness ±32, contrast and saturation x 0.5 to 1.5, hue ±36°, each half of the time; as mmseg has it.

    torchvision's RandomPhotometricDistort is another one: brightness as a factor, saturation towards grey, less
    hue. Contrast comes before saturation and hue or after them. A grey image has neither.
    """
    contrast_first = rng.random() < 0.5
    if rng.random() < 0.5:
        shift = rng.uniform(-32, 32)
        image = _mapped(image, lambda values: values + shift)
    if contrast_first:
        image = _with_contrast(image, rng)
    if image.mode == "RGB":
        image = _with_saturation_and_hue(image, rng)
    return image if contrast_first else _with_contrast(image, rng)


def _with_contrast(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    applies, factor = rng.random() < 0.5, rng.uniform(0.5, 1.5)
    return _mapped(image, lambda values: values * factor) if applies else image


def _with_saturation_and_hue(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    factor = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    turn = rng.uniform(-0.1, 0.1) if rng.random() < 0.5 else 0.0
    if factor == 1.0 and turn == 0.0:
        return image
    hsv = np.array(image.convert("HSV"), dtype=np.float32)
    hsv[..., 0] = (hsv[..., 0] + 256 * turn) % 256
    hsv[..., 1] = (hsv[..., 1] * factor).clip(0, 255)
    return Image.fromarray(hsv.astype(np.uint8), mode="HSV").convert("RGB")


def _mapped(image: Image.Image, change: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    values = np.array(image, dtype=np.float32)
    return Image.fromarray(change(values).clip(0, 255).astype(np.uint8), mode=image.mode)


def _is_mixed(mask: Tensor, largest_share: float) -> bool:
    counts = torch.bincount(mask.flatten().long(), minlength=IGNORED_PIXEL + 1)
    counts[IGNORED_PIXEL] = 0
    labelled = int(counts.sum())
    return labelled > 0 and int(counts.max()) < largest_share * labelled


def _factor(image: Image.Image, shorter: int) -> float:
    short, long = sorted((image.height, image.width))
    return min(shorter / short, _LONGEST * shorter / long)


def _scaled(image: Image.Image, factor: float) -> tuple[int, int]:
    return max(int(image.height * factor + 0.5), 1), max(int(image.width * factor + 0.5), 1)
