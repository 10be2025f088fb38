"""Every kind of image file is read as it looks; every broken one is named, with what to do."""

import contextlib
import os
import pickle
import stat
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from image_trees import encoded, picture, write_picture
from PIL import Image

from snell_scale.data.images import BrokenImage, printable, read_image, read_mask, rng_of

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def rgb(source: Path | bytes) -> np.ndarray:
    image = read_image(source, name="x")
    assert image.mode == "RGB"
    return np.asarray(image)


def test_colour_and_grey_are_what_the_caller_asks_for(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", 1)
    assert rgb(path)[0, 0].tolist() == [50, 0, 200]
    assert read_image(path, name="a", channels=1).mode == "L"
    assert read_image(path.read_bytes(), name="a").tobytes() == read_image(path, name="a").tobytes()
    grey = encoded(Image.fromarray(GREY))
    assert (rgb(grey) == GREY[..., None]).all()
    assert (np.asarray(read_image(grey, name="x", channels=1)) == GREY).all()


def test_exif_orientation_turns_the_image_upright() -> None:
    image = Image.fromarray(GREY)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise to be seen upright
    buffer = encoded_with(image, "PNG", exif=exif)
    assert (rgb(buffer)[..., 0] == np.rot90(GREY, -1)).all()


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled_not_clipped(dtype: str) -> None:
    levels = np.array([[0, 257, 12850, 65535, 40000, 128]], dtype=dtype)
    mode = "I;16" if dtype == "<u2" else "I;16B"
    image = Image.frombytes(mode, (6, 1), levels.tobytes())
    kind = "PNG" if dtype == "<u2" else "TIFF"
    assert rgb(encoded(image, kind))[0, :, 0].tolist() == [0, 1, 50, 255, 156, 0]  # level / 257, rounded


def test_sixteen_bit_colour_png_keeps_its_high_bytes() -> None:
    rows = b"\0" + struct.pack(">3H3H", 0x1234, 0x8000, 0xFFFF, 0, 0x0100, 0x7F00)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")
    assert rgb(content).tolist() == [[[0x12, 0x80, 0xFF], [0, 1, 0x7F]]]


def test_palette_one_bit_and_cmyk_are_converted() -> None:
    palette = picture(2).convert("P", palette=Image.Palette.ADAPTIVE)
    assert rgb(encoded(palette))[0, 0].tolist() == [80, 0, 200]
    bits = Image.fromarray(GREY > 100)
    assert (rgb(encoded(bits))[..., 0] == np.where(GREY > 100, 255, 0)).all()
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    for kind in ("TIFF", "JPEG"):  # the second is stored inverted, as Adobe does
        assert rgb(encoded(cmyk, kind))[0, 0].tolist() == [255, 0, 0]


def test_what_is_transparent_becomes_white() -> None:
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    assert rgb(encoded(half)).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    grey_alpha = Image.new("LA", (1, 1), (0, 128))
    assert rgb(encoded(grey_alpha)).tolist() == [[[127, 127, 127]]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert rgb(encoded_with(palette, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.ones((2, 2), np.float32), "floating-point pixels"),
        (np.full((2, 2), 70000, np.int32), "32-bit pixels"),
    ],
)
def test_pixels_of_unknown_range_are_refused(values: np.ndarray, what: str) -> None:
    with pytest.raises(BrokenImage, match=f"^scan.tif holds {what}; save it"):
        read_image(encoded(Image.fromarray(values), "TIFF"), name="scan.tif")


@pytest.mark.parametrize("pillow_warnings", ["error", "ignore"])
def test_an_image_bomb_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pillow_warnings: Literal["error", "ignore"]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter(pillow_warnings)
        for side in (11, 30):  # above Pillow's limit, where it warns, and above twice of it, where it raises
            path = tmp_path / f"{side}.png"
            path.write_bytes(encoded(Image.new("L", (side, side))))
            with pytest.raises(BrokenImage, match=r"\.png has more than the 100 pixels .*; scale it down"):
                read_image(path, name=str(path))
        assert read_image(encoded(Image.new("L", (10, 10))), name="x").size == (10, 10)


def test_a_png_that_promises_more_pixels_than_memory_has_is_refused_unread() -> None:
    header = struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND")
    )
    with pytest.raises(BrokenImage, match="bomb.png has more than"):
        read_image(content, name="bomb.png")


def test_files_that_are_not_there_or_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    expected = {
        "absent.png": "absent.png does not exist; check the path",
        "": "is a folder, not an image",
        "empty.png": "empty.png is empty",
        "text.jpg": "text.jpg is no image that Pillow knows",
        "loop.png": "loop.png is a link that leads nowhere",
        "nul\0.png": "does not exist",
    }
    for name, message in expected.items():
        for read in (read_image, read_mask):
            with pytest.raises(BrokenImage, match=message):
                read(tmp_path / name, name=str(tmp_path / name))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns of some damage before it gives up
def test_a_truncated_or_scrambled_file_is_refused_or_read_but_never_crashes(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    with pytest.raises(BrokenImage, match=r"^cut (is damaged or truncated|is no image)"):
        read_image(content[: len(content) // 2], name="cut")
    rng = np.random.default_rng(1)
    for _ in range(60):
        scrambled = np.frombuffer(content, np.uint8).copy()
        scrambled[rng.integers(0, min(len(content), 300), 6)] = rng.integers(0, 256, 6)
        with contextlib.suppress(BrokenImage):
            assert read_image(scrambled.tobytes(), name="scrambled").mode == "RGB"


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_picture(tmp_path / "mine.png", 0)

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    path.chmod(0)
    if os.access(path, os.R_OK):  # as root, who may read everything
        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        BrokenImage, match=r"mine.png cannot be opened \(Permission denied\); check its permissions"
    ):
        read_image(path, name=str(path))
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_names_that_are_no_utf8_are_read_and_can_be_printed(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    write_picture(path, 1)
    assert rgb(path)[0, 0].tolist() == [50, 0, 200]
    path.write_bytes(b"nothing")
    with pytest.raises(BrokenImage) as caught:
        read_image(path, name=str(path))
    assert r"caf\xe9.png" in str(caught.value)
    str(caught.value).encode("utf-8")
    assert printable("\ud800") == r"\ud800"
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), BrokenImage)  # a worker process sends it so


def test_masks_keep_their_integers() -> None:
    classes = np.array([[0, 1, 255], [7, 0, 3]], dtype=np.uint8)
    plain = read_mask(encoded(Image.fromarray(classes)), name="m")
    assert plain.dtype == np.uint8
    assert (plain == classes).all()
    indexed = Image.frombytes("P", (3, 2), classes.tobytes())
    indexed.putpalette(list(range(255, -1, -1)) * 3)
    assert (read_mask(encoded(indexed), name="m") == classes).all()
    assert read_mask(encoded(Image.fromarray(classes > 0)), name="m").tolist() == [[0, 1, 1], [1, 0, 1]]
    deep = Image.frombytes("I;16", (2, 1), np.array([300, 65535], "<u2").tobytes())
    assert read_mask(encoded(deep), name="m").tolist() == [[300, 65535]]
    for mode in ("RGB", "RGBA", "LA"):
        assert (read_mask(encoded(Image.fromarray(classes).convert(mode)), name="m") == classes).all()
    with pytest.raises(BrokenImage, match="m is a mask in colours.*8-bit grey or palette PNG"):
        read_mask(encoded(picture(1)), name="m")
    with pytest.raises(BrokenImage, match="m holds floating-point pixels"):
        read_mask(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), name="m")


def test_random_numbers_are_a_function_of_seed_index_and_epoch() -> None:
    drawn = {
        (seed, key): rng_of(seed, key).random() for seed in (0, 1) for key in ((0, 0), (0, 1), (1, 0), (2, 1))
    }
    assert len(set(drawn.values())) == len(drawn)
    assert rng_of(1, (2, 1)).random() == drawn[1, (2, 1)]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encoded_with(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
