"""A grid of images, each framed green or red by whether the model was right, with what it said below."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset

from snell_scale.data.batches import collate, num_samples
from snell_scale.interfaces import Batch, InputSpec

_NUM_SHOWN = 24
_COLUMNS = 8
_SIDE = 112
_FRAME = 4
_LINE = 14
_LINES = 6
_RIGHT, _WRONG = (46, 125, 50), (198, 40, 40)


def shown_samples(split: Dataset[Batch]) -> Batch:
    """Samples from all over the split, as of epoch 0, stacked: the same ones on every rank and at every time."""
    total = num_samples(split)
    number = min(_NUM_SHOWN, total)
    return collate([split[(position * total // number, 0)] for position in range(number)])


def tiles(images: Tensor, texts: Sequence[str], *, right: Sequence[bool], spec: InputSpec) -> Tensor:
    """(H, W, 3) uint8 of normalised images (B, C, h, w) on the CPU with a text below each."""
    columns = min(_COLUMNS, len(texts))
    width = _SIDE + 3 * _FRAME
    font = ImageFont.load_default(size=12)
    written = [_wrapped(text, width - _FRAME, font) for text in texts]
    height = width + _LINE * max(len(lines) for lines in written)
    canvas = Image.new("RGB", (columns * width, math.ceil(len(texts) / columns) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (pixels, lines, is_right) in enumerate(
        zip(_eight_bit(images, spec), written, right, strict=True)
    ):
        left, top = number % columns * width, number // columns * height
        colour = _RIGHT if is_right else _WRONG
        draw.rectangle((left, top, left + _SIDE + 2 * _FRAME - 1, top + _SIDE + 2 * _FRAME - 1), fill=colour)
        canvas.paste(_scaled(pixels), (left + _FRAME, top + _FRAME))
        for position, line in enumerate(lines):
            draw.text((left, top + _SIDE + 2 * _FRAME + position * _LINE), line, fill=colour, font=font)
    return torch.from_numpy(np.array(canvas))


def _eight_bit(images: Tensor, spec: InputSpec) -> list[np.ndarray]:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    pixels = ((images.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return list(pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def _scaled(pixels: np.ndarray) -> Image.Image:
    """Its shape kept; small images enlarged without smoothing, so that what the model sees is seen."""
    height, width = pixels.shape[:2]
    factor = _SIDE / max(height, width)
    resample = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BICUBIC
    return Image.fromarray(pixels).resize(
        (max(1, round(width * factor)), max(1, round(height * factor))), resample
    )


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines that fit, at most so many as are shown."""
    lines: list[str] = []
    for paragraph in text.encode("ascii", "replace").decode("ascii").split("\n"):  # what the font has
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines[:_LINES]
