"""Files that hold images and captions, made by hand."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def png(value: int, *, size: tuple[int, int] = (8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(content, format="PNG")
    return content.getvalue()


def write_images(folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        (folder / f"{index}.png").write_bytes(png(index * 10))


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def ten_pairs(folder: Path, *, header: str = "filepath,title,kind", rows: list[str] | None = None) -> Path:
    """A list of ten images, two captions each, one of them with commas and quotes in quotes."""
    write_images(folder / "images", 10)
    path = folder / "pairs.csv"
    lines = [
        f'images/{i}.png,"{i}, the ""first""",{"ab"[i % 2]}\nimages/{i}.png,second {i},{"ab"[i % 2]}'
        for i in range(10)
    ]
    path.write_text("\n".join([header, *(rows or lines)]) + "\n")
    return path
