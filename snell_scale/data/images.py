"""Reads images and masks of any common kind safely: what cannot be read is named, with what to do about it."""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from snell_scale.interfaces import SampleKey

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""What files in a folder of images are taken for images."""

_SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
# What Pillow's decoders were seen to raise on damaged files, beside OSError.
_DECODER_ERRORS = (SyntaxError, ValueError, EOFError, struct.error, zlib.error, TypeError, LookupError)
_DECODER_ERRORS += (OverflowError, RuntimeError)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class BrokenImage(ValueError):
    """An image or mask file that cannot be used: the message names it, says why, and what to do."""


def read_image(source: Path | bytes, *, name: str, channels: int = 3) -> Image.Image:
    """The image in mode RGB (channels=3) or L (channels=1), turned upright as its EXIF orientation says.

    source: a file, or its content; name: what messages call it. Transparent parts become white, 16-bit grey is
    scaled (not clipped) to 8 bit, palettes, CMYK and 1-bit images are converted, of an animation the first frame
    counts.
    BrokenImage: absent, unreadable, truncated, no image, more pixels than Pillow's `Image.MAX_IMAGE_PIXELS`, or
    pixels that have no obvious 8-bit value (floating point, 32-bit).
    """
    if channels not in (1, 3):
        raise ValueError(
            f"the model asks for images of {channels} channels; files give 1 (grey) or 3: take another model"
        )
    with _opened(source, name) as image:
        return _as_eight_bit(image, name).convert("RGB" if channels == 3 else "L")


def read_mask(source: Path | bytes, *, name: str) -> np.ndarray:
    """(H, W) integers as the file holds them: grey values, palette indexes, or 0 and 1 of a 1-bit image.

    uint8, or int32 for 16- and 32-bit files. Colour channels must be equal, then they are the grey value; an
    alpha channel is left out. BrokenImage: as `read_image`, and for a mask in colours.
    """
    with _opened(source, name) as image:
        if image.mode == "F":
            raise _broken(
                name, "holds floating-point pixels", "save the mask with integer classes, e.g. as 8-bit PNG"
            )
        pixels = np.asarray(image)
        if pixels.ndim == 3:
            pixels = _one_channel(pixels, image.mode, name)
        return pixels.astype(np.uint8 if pixels.dtype.itemsize == 1 else np.int32)


def rng_of(seed: int, key: SampleKey) -> np.random.Generator:
    """The source of everything that is random about one sample in one epoch."""
    index, epoch = key
    return np.random.default_rng([seed, index, epoch])


def printable(name: object) -> str:
    """A file's name for messages: bytes that are no UTF-8 become \\xNN, which any terminal or file takes."""
    escaped = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", str(name))
    return escaped.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """The decoded, upright image; whatever goes wrong inside is a BrokenImage that names it."""
    if isinstance(source, bytes):
        if not source:
            raise _broken(name, "is empty (0 bytes)", "copy it again from its origin")
        with _decoded(BytesIO(source), name) as image:
            yield image
        return
    _check_is_file(source, name)
    try:
        file = source.open("rb")
    except OSError as error:
        raise _broken(name, f"cannot be opened ({error.strerror})", "check its permissions") from error
    with file, _decoded(file, name) as image:
        yield image


@contextmanager
def _decoded(file, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            _check_pixels(image, name)
            image.load()
            upright = ImageOps.exif_transpose(image)
        yield upright
    except BrokenImage:
        raise
    except _BOMBS as error:
        raise _bomb(name) from error
    except Image.UnidentifiedImageError as error:
        raise _broken(name, "is no image that Pillow knows", "convert it, e.g. to PNG, or remove it") from error
    except (OSError, *_DECODER_ERRORS) as error:
        raise _broken(name, f"is damaged or truncated ({error})", "copy it again from its origin") from error


def _check_is_file(path: Path, name: str) -> None:
    try:
        if path.is_file():
            if path.stat().st_size == 0:
                raise _broken(name, "is empty (0 bytes)", "copy it again from its origin")
            return
        what = "is a folder, not an image" if path.is_dir() else "does not exist"
        if path.is_symlink():
            what = "is a link that leads nowhere"
    except (OSError, UnicodeEncodeError) as error:
        raise _broken(name, f"cannot be reached ({error})", "check the permissions of its folders") from error
    raise _broken(name, what, "check the path, or complete the data set")


def _check_pixels(image: Image.Image, name: str) -> None:
    """Pillow itself only warns up to twice its limit."""
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _bomb(name)


def _bomb(name: str) -> BrokenImage:
    limit = f"{Image.MAX_IMAGE_PIXELS:,}" if Image.MAX_IMAGE_PIXELS is not None else "none"
    return _broken(
        name,
        f"has more than the {limit} pixels that Pillow allows (Image.MAX_IMAGE_PIXELS): a decompression bomb?",
        "scale it down if it is genuine, or remove it",
    )


def _as_eight_bit(image: Image.Image, name: str) -> Image.Image:
    """A mode that Pillow converts to RGB and L without loss of meaning, opaque."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise _broken(name, "holds 32-bit pixels", "save it with 8 or 16 bits per channel")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise _broken(
            name, "holds floating-point pixels", "save it with 8 bits per channel; their range is not known"
        )
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha)
    return image


def _one_channel(pixels: np.ndarray, mode: str, name: str) -> np.ndarray:
    colours = pixels[..., :-1] if mode in ("RGBA", "LA", "PA", "La", "RGBa") else pixels
    if (colours != colours[..., :1]).any():
        raise _broken(
            name,
            "is a mask in colours, and which class a colour stands for is not known",
            "save one integer class per pixel, as an 8-bit grey or palette PNG",
        )
    return colours[..., 0]


def _broken(name: str, what: str, remedy: str) -> BrokenImage:
    return BrokenImage(f"{printable(name)} {what}; {remedy}")
