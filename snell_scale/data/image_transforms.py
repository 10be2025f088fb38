"""From a decoded image to what a model takes: size, augmentation, normalisation. torchvision does the work."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from snell_scale.interfaces import InputSpec

Resizing = Literal["crop", "squash"]
Augmentation = Literal["none", "flip", "crop-flip"]

_PUBLISHED_SCALE = (0.08, 1.0)
_PUBLISHED_RATIO = (3 / 4, 4 / 3)


class ImageTransform:
    """A decoded image → (C, H, W) float32, normalised; random where it augments, a function of `rng` alone.

    torchvision draws from torch's global generator, which is seeded from `rng` for the call and put back after
    it: nobody else's random numbers change, and no other generator (a GPU's) is touched.
    """

    def __init__(self, steps: Sequence[nn.Module], spec: InputSpec, *, is_random: bool) -> None:
        self._steps = v2.Compose(list(steps))
        self._mean = torch.tensor(spec.mean).view(-1, 1, 1)
        self._std = torch.tensor(spec.std).view(-1, 1, 1)
        self.is_random = is_random

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        if not self.is_random:
            return self._normalised(self._steps(image))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            return self._normalised(self._steps(image))

    def _normalised(self, image: Image.Image) -> Tensor:
        pixels = np.atleast_3d(np.array(image, dtype=np.float32))  # (H, W) of a grey image becomes (H, W, 1)
        return ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - self._mean) / self._std).contiguous()


def evaluation_transform(spec: InputSpec, *, resizing: Resizing) -> ImageTransform:
    """crop: the shorter side to size / crop_fraction, then the centre; squash: both sides, whatever the shape."""
    return ImageTransform(_resized(spec, resizing), spec, is_random=False)


def training_transform(
    spec: InputSpec,
    *,
    resizing: Resizing,
    augmentation: Augmentation,
    rand_augment: int | None = None,
    color_jitter: float = 0.0,
) -> ImageTransform:
    """none: as in evaluation; flip: mirrored half of the time; crop-flip: and a random crop instead of resizing.

    The crop has 8 to 100 % of the area and sides of 3:4 to 4:3, as in the published FGVC runs. rand_augment:
    magnitude (0 to 30) of two operations of RandAugment; color_jitter: of brightness, contrast and saturation.
    """
    interpolation = _interpolation(spec)
    if augmentation == "crop-flip":
        size = (spec.height, spec.width)
        crop = v2.RandomResizedCrop(
            size, scale=_PUBLISHED_SCALE, ratio=_PUBLISHED_RATIO, interpolation=interpolation
        )
        steps: list[nn.Module] = [crop, v2.RandomHorizontalFlip()]
    else:
        steps = _resized(spec, resizing)
        steps += [v2.RandomHorizontalFlip()] if augmentation == "flip" else []
    if rand_augment is not None:
        steps.append(v2.RandAugment(magnitude=rand_augment, interpolation=InterpolationMode.BILINEAR))
    if color_jitter > 0:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    is_random = augmentation != "none" or rand_augment is not None or color_jitter > 0
    return ImageTransform(steps, spec, is_random=is_random)


def _resized(spec: InputSpec, resizing: Resizing) -> list[nn.Module]:
    size, interpolation = (spec.height, spec.width), _interpolation(spec)
    if resizing == "squash":
        return [v2.Resize(size, interpolation=interpolation)]
    if spec.height != spec.width:
        raise ValueError(
            f"the model takes {spec.height}x{spec.width} images, which are not cropped from the middle; set "
            "data.resize=squash"
        )
    # timm rounds down: 224 / 0.9 → 248.
    shorter = int(spec.height / spec.crop_fraction)
    return [v2.Resize(shorter, interpolation=interpolation), v2.CenterCrop(size)]


def _interpolation(spec: InputSpec) -> InterpolationMode:
    """ValueError for a name that Pillow has no filter of."""
    names = [mode.value for mode in InterpolationMode]
    if spec.interpolation not in names:
        raise ValueError(
            f"interpolation is {spec.interpolation!r}, expected one of {', '.join(names)}; set data.interpolation"
        )
    return InterpolationMode(spec.interpolation)
