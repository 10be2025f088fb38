"""A run's pictures on disk."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def write_pictures(folder: Path, pictures: Mapping[str, Tensor], *, prefix: str = "") -> None:
    """Write each (H, W, 3) uint8 picture as <prefix><name>.png; a picture is there whole or not at all."""
    from PIL import Image  # only runs whose task shows something need it

    if pictures:
        folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        aside = folder / f".{prefix}{name}.partial"
        Image.fromarray(picture.numpy()).save(aside, format="PNG")
        aside.rename(folder / f"{prefix}{name}.png")
