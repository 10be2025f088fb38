"""What a segmentation model says of images of any size: by windows, at several scales, flipped; averaged."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Inference:
    """How pixels of an evaluation image get their probabilities.

    window: None shows the model the whole image; else the size of the windows that it sees one by one, `stride`
    pixels apart, whose logits are averaged where they overlap. scales: factors of the image's size; flip: each
    scale mirrored, too. Probabilities (after the softmax), not logits, are averaged over scales and flips, and
    logits are first brought to the mask's size: the published way of SETR and UPerNet (mmseg's slide_inference
    and aug_test). multiple: a whole image is resized so that its sides are multiples of it.
    """

    window: Size | None = None
    stride: Size | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    windows_per_forward: int = 8
    multiple: int = 1

    def log_probabilities(self, model: nn.Module, images: Tensor, size: Size) -> Tensor:
        """images (B, channels, H, W) → (B, classes, *size) float32, log of each pixel's class probabilities."""
        shown = [
            (scale, mirrored) for scale in self.scales for mirrored in ((False, True) if self.flip else (False,))
        ]
        if len(shown) == 1:
            return self._logits_at(model, images, size, *shown[0]).log_softmax(1)
        # One by one: for many classes and large masks each is large.
        total = self._logits_at(model, images, size, *shown[0]).softmax(1)
        for scale, mirrored in shown[1:]:
            total += self._logits_at(model, images, size, scale, mirrored).softmax(1)
        return (total / len(shown)).clamp_min(torch.finfo(total.dtype).tiny).log()

    def num_forwards(self, images: Tensor) -> int:
        """How often `log_probabilities` calls the model for these images."""
        per_scale = [self._num_calls(self._scaled_size(images, scale), len(images)) for scale in self.scales]
        return sum(per_scale) * (2 if self.flip else 1)

    def idle_forward(self, model: nn.Module, images: Tensor) -> None:
        """One call of the model, for where another rank has more of them."""
        if self.window is None:
            model(_resized(images[:1], self._scaled_size(images, 1.0)))
        else:
            model(_padded(images[:1], self.window)[..., : self.window[0], : self.window[1]])

    def _scaled_size(self, images: Tensor, scale: float) -> Size:
        multiple = self.multiple if self.window is None else 1
        height, width = (
            math.ceil(max(round(side * scale), 1) / multiple) * multiple for side in images.shape[-2:]
        )
        return height, width

    def _num_calls(self, size: Size, num_images: int) -> int:
        if self.window is None:
            return 1
        assert self.stride is not None
        sides = zip(size, self.window, self.stride, strict=True)
        num_windows = math.prod(
            len(window_starts(max(side, window), window, step)) for side, window, step in sides
        )
        return math.ceil(num_windows * num_images / self.windows_per_forward)

    def _logits_at(self, model: nn.Module, images: Tensor, size: Size, scale: float, mirrored: bool) -> Tensor:
        """Logits of the scaled, possibly mirrored images, put back upright and to `size`."""
        scaled = _resized(images, self._scaled_size(images, scale))
        logits = self._logits(model, scaled.flip(-1)).flip(-1) if mirrored else self._logits(model, scaled)
        return _to_size(logits, size)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        if self.window is None:
            return model(images).float()
        assert self.stride is not None
        height, width = images.shape[-2:]
        padded = _padded(images, self.window)
        return _by_windows(model, padded, self.window, self.stride, self.windows_per_forward)[
            ..., :height, :width
        ]


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side: every `stride` pixels, the last one moved back to end with the image."""
    last = side - window
    return [min(start, last) for start in range(0, last + stride, stride)]


def _by_windows(model: nn.Module, images: Tensor, window: Size, stride: Size, batch: int) -> Tensor:
    """Mean over the windows that a pixel lies in of their logits, (B, classes, H, W) float32."""
    rows, columns = (
        window_starts(side, *pair) for side, *pair in zip(images.shape[-2:], window, stride, strict=True)
    )
    places = [(image, row, column) for image in range(len(images)) for row in rows for column in columns]
    areas = [(i, slice(y, y + window[0]), slice(x, x + window[1])) for i, y, x in places]
    total: Tensor | None = None
    seen = images.new_zeros(len(images), 1, *images.shape[-2:], dtype=torch.float32)
    for first in range(0, len(areas), batch):
        part = areas[first : first + batch]
        logits = model(torch.stack([images[i, :, ys, xs] for i, ys, xs in part])).float()
        if total is None:
            total = seen.new_zeros(len(images), logits.shape[1], *images.shape[-2:])
        for (i, ys, xs), of_window in zip(part, logits, strict=True):
            total[i, :, ys, xs] += of_window
            seen[i, :, ys, xs] += 1
    assert total is not None
    return total / seen


def _padded(images: Tensor, window: Size) -> Tensor:
    """At least as large as a window; what is added is the mean colour, which is 0 after normalisation."""
    missing = [max(window[axis] - images.shape[axis - 2], 0) for axis in (0, 1)]
    return pad(images, (0, missing[1], 0, missing[0])) if any(missing) else images


def _resized(images: Tensor, size: Size) -> Tensor:
    if size == tuple(images.shape[-2:]):
        return images
    return interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def _to_size(logits: Tensor, size: Size) -> Tensor:
    if tuple(logits.shape[-2:]) == size:
        return logits
    return interpolate(logits, size=size, mode="bilinear", align_corners=False)
