"""Pairs of image and mask files: finding them, what the masks' values mean, reading them as samples."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from snell_scale.data.images import SUFFIXES, BrokenImage, printable, read_image, read_mask, rng_of
from snell_scale.data.reading import ReadingProgress, problems_of
from snell_scale.interfaces import IGNORED_PIXEL, Batch, SampleKey

_LISTED = 5

Transform = Callable[[Image.Image, np.ndarray, np.random.Generator], Batch]


@dataclass(frozen=True)
class Pair:
    """An image file and its mask's."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Labels:
    """What the values of mask files mean: class numbers, or IGNORED_PIXEL.

    values: of grey or palette masks; threshold: instead, values from it on are class 1, others 0; colours:
    instead, of RGB masks, keys 0xRRGGBB.
    """

    class_names: tuple[str, ...]
    values: Mapping[int, int] | None = None
    threshold: int | None = None
    colours: Mapping[int, int] | None = None

    def read(self, path: Path) -> np.ndarray:
        """(H, W) uint8. BrokenImage (a ValueError): unreadable, or a value that stands for no class."""
        name = str(path)
        if self.threshold is not None:
            grey = np.asarray(read_image(path, name=name, channels=1))
            if self.threshold > 1 and grey.max(initial=0) == 1:
                raise BrokenImage(
                    f"{printable(name)} has the values 0 and 1 only, but its classes are told apart at "
                    f"{self.threshold}; set data.threshold=1"
                )
            return (grey >= self.threshold).astype(np.uint8)
        if self.colours is not None:
            red, green, blue = np.moveaxis(np.asarray(read_image(path, name=name), dtype=np.int32), -1, 0)
            return self._classes(red << 16 | green << 8 | blue, self.colours, name, lambda value: f"#{value:06x}")
        return self._classes(read_mask(path, name=name), self.values or {}, name, str)

    def _classes(
        self, raw: np.ndarray, classes: Mapping[int, int], name: str, show: Callable[[int], str]
    ) -> np.ndarray:
        found, places = np.unique(raw, return_inverse=True) if raw.dtype != np.uint8 else (np.arange(256), raw)
        table = np.array([classes.get(value, -1) for value in found.tolist()])
        mapped = table[places].reshape(raw.shape)
        if mapped.min(initial=0) < 0:
            unknown = [show(value) for value in np.unique(raw[mapped < 0]).tolist()]
            raise BrokenImage(
                f"{printable(name)} has the value(s) {_first(unknown)}, which stand for no class; expected "
                f"{_first([show(value) for value in sorted(classes)], 12)}; correct the mask, or the data's "
                "classes and ignored values"
            )
        return mapped.astype(np.uint8)


class SegmentationFiles(Dataset[Batch]):
    """Images and masks of one split, read when asked for. Samples: see `transform`.

    Stacked samples of different sizes are padded at the right and below: images with 0, masks with IGNORED_PIXEL.
    """

    def __init__(
        self, pairs: Sequence[Pair], labels: Labels, *, transform: Transform, channels: int, seed: int
    ) -> None:
        self._pairs = pairs
        self._labels = labels
        self._transform = transform
        self._channels = channels
        self._seed = seed

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, key: SampleKey) -> Batch:
        try:
            image, mask = read_pair(self._pairs[key[0]], self._labels, channels=self._channels)
        except BrokenImage as error:
            raise BrokenImage(
                f"{error}; or set data.skip_broken=true to leave out what cannot be used"
            ) from error
        return self._transform(image, mask, rng_of(self._seed, key))

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        samples = [self[key] for key in keys]
        return {name: _stacked([sample[name] for sample in samples], name) for name in samples[0]}


def read_pair(pair: Pair, labels: Labels, *, channels: int) -> tuple[Image.Image, np.ndarray]:
    """The image (RGB or L) and its classes (H, W) uint8. BrokenImage: unreadable, or not of one size."""
    image = read_image(pair.image, name=str(pair.image), channels=channels)
    mask = labels.read(pair.mask)
    if mask.shape != (image.height, image.width):
        raise BrokenImage(
            f"{printable(pair.mask)} is {mask.shape[1]}x{mask.shape[0]} pixels, but its image "
            f"{printable(pair.image)} {image.width}x{image.height}; a mask has one value for each pixel: make it "
            "again, or remove the pair"
        )
    return image, mask


def find_pairs(images: Path, masks: Path, *, mask_suffix: str = "") -> list[Pair]:
    """Every image below a folder with the mask of the same relative name, whatever its ending; sorted.

    mask_suffix: what a mask's name has after its image's ("_mask": a/x.jpg and a/x_mask.png). ValueError: a
    folder is absent or empty, an image has no mask or a mask no image, or two files have one name.
    """
    by_image = _by_stem(images)
    by_mask = {
        stem.removesuffix(mask_suffix): path
        for stem, path in _by_stem(masks).items()
        if stem.endswith(mask_suffix)
    }
    problems = [
        f"{len(alone)} without {what}: {_first([printable(stem) for stem in alone])}"
        for alone, what in (
            (sorted(by_image.keys() - by_mask.keys()), f"a mask in {printable(masks)}"),
            (sorted(by_mask.keys() - by_image.keys()), f"an image in {printable(images)}"),
        )
        if alone
    ]
    if problems:
        raise ValueError(
            f"images and masks do not pair up by name: {'; '.join(problems)}; add what is missing, remove what "
            "is left over, or set data.mask_suffix"
        )
    return [Pair(by_image[stem], by_mask[stem]) for stem in sorted(by_image, key=os.fsencode)]


def sift(
    splits: Mapping[str, Sequence[Pair]], labels: Labels, *, channels: int
) -> tuple[dict[str, list[Pair]], list[str]]:
    """Reads every pair: the splits of those that can be used, and for the others what is wrong with them.

    Says on stderr how far it is, and what is left out.
    """

    def problem(pair: Pair) -> str | None:
        try:
            read_pair(pair, labels, channels=channels)
        except BrokenImage as error:
            return str(error)
        return None

    progress = ReadingProgress(sum(len(pairs) for pairs in splits.values()))
    good: dict[str, list[Pair]] = {}
    broken: list[str] = []
    for name, pairs in splits.items():
        problems = problems_of(pairs, problem, progress)
        good[name] = [pair for pair, message in zip(pairs, problems, strict=True) if message is None]
        broken += [message for message in problems if message]
    progress.close()
    return good, broken


def check_apart(splits: Mapping[str, Sequence[Pair]]) -> None:
    """ValueError where one image is in two splits: what is trained on must not be tested on."""
    seen: dict[str, str] = {}
    for name, pairs in splits.items():
        for pair in pairs:
            other = seen.setdefault(os.path.realpath(pair.image), name)
            if other != name:
                raise ValueError(
                    f"{printable(pair.image)} is in the {other} split and in the {name} split; keep the folders "
                    "of training and test images apart, neither within the other"
                )


def _by_stem(folder: Path) -> dict[str, Path]:
    """Name below the folder without its ending → file."""
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {printable(folder)} (looked for from {Path.cwd()}); check data.root"
        )
    found: dict[str, Path] = {}
    for path in _files(folder, frozenset()):
        stem = os.fspath(path.relative_to(folder).with_suffix(""))
        if stem in found:
            raise ValueError(
                f"{printable(path)} and {printable(found[stem].name)} have one name, so that an image could have "
                "two masks; remove or rename one of them"
            )
        found[stem] = path
    if not found:
        raise ValueError(
            f"{printable(folder)} holds no image files ({', '.join(sorted(SUFFIXES))}); check the folder"
        )
    return found


def _files(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """Image files below, sorted; links to folders are followed, but not back into a folder they are below."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name)):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):  # False, where DirEntry raises, for a link to itself
            yield from _files(folder / entry.name, above | {real})
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield folder / entry.name


def _stacked(tensors: Sequence[Tensor], name: str) -> Tensor:
    if name not in ("image", "mask"):
        return torch.stack(list(tensors))
    height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (-2, -1))
    fill = IGNORED_PIXEL if name == "mask" else 0
    return torch.stack([pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=fill) for t in tensors])


def _first(items: Sequence[str], number: int = _LISTED) -> str:
    shown = ", ".join(items[:number])
    return f"{shown}, … ({len(items)} in all)" if len(items) > number else shown
