"""Pictures of segmentations: image, truth and prediction side by side, with a legend of the classes shown."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from snell_scale.interfaces import IGNORED_PIXEL, InputSpec

_TILE = 192  # pixels of a tile's longer side: what is smaller is enlarged by a whole factor
_LARGEST = 512  # and larger ones are shrunk: masks of ADE20K have thousands of pixels
_GAP = 8
_LINE = 18
_ALPHA = 0.65
_HATCH = 6
_ENTRY = 150  # pixels of an entry of the legend
_TITLES = ("image", "ground truth", "prediction")
_UNPAINTED = "background"

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Example:
    """On the CPU. image (C, H, W) as the model saw it; truth, prediction (h, w) int64."""

    image: Tensor
    truth: Tensor
    prediction: Tensor


def picture_of(examples: Sequence[Example], *, spec: InputSpec, class_names: Sequence[str]) -> Tensor:
    """(H, W, 3) uint8: a row for each example, below them the colours of the classes that occur.

    Ignored pixels of the truth are hatched in grey; a class called "background" is not painted.
    """
    colours = class_colours(class_names)
    rows = [_row(example, spec, colours) for example in examples]
    width = max(row.shape[1] for row in rows)
    shown: set[int] = {c for e in examples for mask in (e.truth, e.prediction) for c in mask.unique().tolist()}
    entries: list[tuple[str, Colour]] = []
    for number in sorted(shown - {IGNORED_PIXEL}):
        colour = colours[number]
        if colour is not None:
            entries.append((class_names[number], colour))
    legend = _legend(entries, width)
    return torch.from_numpy(np.concatenate([_widened(part, width) for part in (*rows, legend)]))


def class_colours(class_names: Sequence[str]) -> list[Colour | None]:
    """A colour for each class, neighbours far apart in hue; None for the background."""
    colours: list[Colour | None] = []
    for number, name in enumerate(class_names):
        # Steps of the golden ratio around the circle never come back to a hue they were close to.
        hue, value = (0.618034 * number) % 1.0, (1.0, 0.75, 0.9)[number % 3]
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, value))
        colours.append(None if name == _UNPAINTED else (red, green, blue))
    return colours


def overlay(image: Tensor, mask: Tensor, colours: Sequence[Colour | None]) -> Tensor:
    """(3, H, W) uint8: the image in grey, which hides no class's colour, with `mask` (H, W) painted over it."""
    from torchvision.transforms.v2.functional import rgb_to_grayscale
    from torchvision.utils import draw_segmentation_masks

    painted = [(mask == number, colour) for number, colour in enumerate(colours) if colour is not None]
    ignored = mask == IGNORED_PIXEL
    rows, columns = (torch.arange(side) for side in mask.shape)
    stripes = ((rows.unsqueeze(1) + columns) // _HATCH) % 2 == 0
    painted += [(ignored & stripes, (90, 90, 90)), (ignored & ~stripes, (190, 190, 190))]
    there = [(area, colour) for area, colour in painted if bool(area.any())]
    image = rgb_to_grayscale(image, num_output_channels=3)
    if not there:
        return image
    masks = torch.stack([area for area, _ in there])
    return draw_segmentation_masks(image, masks, alpha=_ALPHA, colors=[colour for _, colour in there])


def _row(example: Example, spec: InputSpec, colours: Sequence[Colour | None]) -> np.ndarray:
    """(height, width, 3) uint8: the example's three pictures beside each other, each below its title."""
    shrunk = min(_LARGEST / max(example.truth.shape), 1.0)
    size = (max(round(shrunk * example.truth.shape[0]), 1), max(round(shrunk * example.truth.shape[1]), 1))
    image = _visible(example.image, spec, size)
    truth, prediction = (_shrunk(mask, size) for mask in (example.truth, example.prediction))
    enlarged = max(_TILE // max(size), 1)
    image, truth, prediction = (
        part.repeat_interleave(enlarged, -1).repeat_interleave(enlarged, -2)
        for part in (image, truth, prediction)
    )
    pictures = (image, overlay(image, truth, colours), overlay(image, prediction, colours))
    tiles = [_titled(picture, title) for picture, title in zip(pictures, _TITLES, strict=True)]
    gap = np.full((tiles[0].shape[0], _GAP, 3), 255, np.uint8)
    return np.concatenate([tiles[0], gap, tiles[1], gap, tiles[2]], axis=1)


def _visible(image: Tensor, spec: InputSpec, size: tuple[int, int]) -> Tensor:
    """(3, *size) uint8 of a normalised image."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    shown = (image.float() * std + mean).clamp(0, 1).expand(3, -1, -1)
    if tuple(shown.shape[-2:]) != size:
        shown = interpolate(shown.unsqueeze(0), size=size, mode="bilinear", antialias=True).squeeze(0).clamp(0, 1)
    return (255 * shown).round().to(torch.uint8)


def _shrunk(mask: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(mask.shape) == size:
        return mask
    return interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(mask.dtype)


def _titled(picture: Tensor, title: str) -> np.ndarray:
    strip = _written([(title, None, 0)], width=picture.shape[2], lines=1)
    return np.concatenate([strip, picture.permute(1, 2, 0).numpy(), np.full_like(strip[:_GAP], 255)])


def _legend(entries: Sequence[tuple[str, Colour]], width: int) -> np.ndarray:
    per_line = max(width // _ENTRY, 1)
    placed = [(name, colour, number) for number, (name, colour) in enumerate(entries)]
    return _written(placed, width=width, lines=-(-len(entries) // per_line))


def _written(entries: Sequence[tuple[str, Colour | None, int]], *, width: int, lines: int) -> np.ndarray:
    """(lines, width, 3) uint8 of text; an entry: its words, the colour of the box before them, its place."""
    from PIL import Image, ImageDraw  # only runs that show something need it

    sheet = Image.new("RGB", (width, _LINE * lines), "white")
    draw = ImageDraw.Draw(sheet)
    per_line = max(width // _ENTRY, 1)
    for words, colour, place in entries:
        x, y = _ENTRY * (place % per_line), _LINE * (place // per_line)
        if colour is not None:
            draw.rectangle((x, y + 3, x + 11, y + 14), fill=colour)
            x += 17
        draw.text((x, y + 3), words[:20], fill="black")
    return np.array(sheet)


def _widened(part: np.ndarray, width: int) -> np.ndarray:
    return np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255)
