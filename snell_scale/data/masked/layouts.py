"""Segmentation data in folders: ADE20K, Kvasir-SEG, the polyp benchmark, and any pairs of images and masks."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from snell_scale.data.images import printable
from snell_scale.data.masked.files import Labels, Pair, find_pairs
from snell_scale.data.masked.folder import SegmentationFolder, divided
from snell_scale.interfaces import IGNORED_PIXEL, DataBundle, Preprocessing

_ADE20K_CLASSES = 150


class Ade20kConfig(SegmentationFolder):
    """ADE20K scene parsing, 150 classes; its official validation images are the test split."""

    name: Literal["ade20k"] = "ade20k"

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """root: ADEChallengeData2016, or the folder that holds it. See `SegmentationFolder`.

        Masks: 0 is ignored, 1 to 150 are the classes 0 to 149, named by objectInfo150.txt where that is there.
        """
        root = Path(self.root)
        root = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
        known, test = (
            find_pairs(root / "images" / part, root / "annotations" / part) for part in ("training", "validation")
        )
        train, validation = divided(known, [self.validation_fraction], seed=seed)
        values = {0: IGNORED_PIXEL} | {value: value - 1 for value in range(1, _ADE20K_CLASSES + 1)}
        return self._bundle(
            {"train": train, "validation": validation, "test": test},
            Labels(_ade20k_names(root / "objectInfo150.txt"), values=values),
            seed=seed,
            preprocessing=preprocessing or Preprocessing(),
        )


class MaskPairsConfig(SegmentationFolder):
    """Images and masks in folders of their own, paired by name; or laid out as Kvasir-SEG or PraNet's polyps."""

    name: Literal["mask_pairs"] = "mask_pairs"
    layout: Literal["pairs", "kvasir", "polyp"] = Field(
        default="pairs",
        description="polyp: TrainDataset/{image,mask}, TestDataset/<set>/{images,masks}; kvasir: as pairs.",
    )
    images: str = Field(default="images", description="Folder of the images below root.")
    masks: str = Field(default="masks", description="Folder of the masks below root.")
    mask_suffix: str = Field(default="", description="What a mask's name has after its image's, e.g. '_mask'.")
    test_images: str | None = Field(default=None, description="Folder of the test images; null: test_fraction.")
    test_masks: str | None = Field(default=None, description="Folder of their masks.")
    test_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of all images; by data_seed."
    )
    test_sets: tuple[str, ...] = Field(default=(), description="polyp: folders of TestDataset; empty: all.")
    mask_values: dict[str, list[int]] = Field(
        default={}, description="Class → the values it has in the masks, in the order of the classes."
    )
    mask_colours: dict[str, list[str]] = Field(
        default={}, description="Instead, for masks in colours: class → its '#rrggbb'."
    )
    ignore_values: tuple[int | str, ...] = Field(
        default=(), description="Values (or '#rrggbb') of pixels that belong to no class."
    )
    threshold: int | None = Field(
        default=None, gt=0, description="Instead: values from it on are `foreground`, others background."
    )
    foreground: str = Field(default="foreground", description="The class of `threshold`.")

    @model_validator(mode="after")
    def _check(self) -> "MaskPairsConfig":
        given = [key for key in ("mask_values", "mask_colours", "threshold") if getattr(self, key)]
        if self.layout != "pairs" and (given or self.ignore_values):
            raise ValueError(
                f"{', '.join(given) or 'ignore_values'} is for layout=pairs; {self.layout} has its own"
            )
        if self.layout == "pairs" and len(given) != 1:
            raise ValueError(
                "give exactly one of mask_values, mask_colours and threshold: what the masks' values mean"
            )
        if (self.test_images is None) != (self.test_masks is None):
            raise ValueError("give both test_images and test_masks, or neither")
        if self.layout == "polyp" and (self.test_fraction or self.test_images):
            raise ValueError("layout=polyp has its own test images: remove test_fraction and test_images")
        if self.layout != "polyp" and (self.test_fraction is None) == (self.test_images is None):
            raise ValueError("give exactly one of test_fraction and test_images (with test_masks)")
        if self.test_sets and self.layout != "polyp":
            raise ValueError("test_sets is for layout=polyp")
        self._labels()
        return self

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """See `SegmentationFolder`. ValueError: files that do not pair up, folders that are absent or empty."""
        root = Path(self.root)
        if self.layout == "polyp":
            known, test = _polyp_pairs(root, self.test_sets)
        else:
            known = find_pairs(root / self.images, root / self.masks, mask_suffix=self.mask_suffix)
            test = []
            if self.test_images is not None and self.test_masks is not None:
                test = find_pairs(root / self.test_images, root / self.test_masks, mask_suffix=self.mask_suffix)
        fractions = [self.validation_fraction] + ([self.test_fraction] if self.test_fraction else [])
        train, validation, *more = divided(known, fractions, seed=seed)
        return self._bundle(
            {"train": train, "validation": validation, "test": more[0] if more else test},
            self._labels(),
            seed=seed,
            preprocessing=preprocessing or Preprocessing(),
        )

    def _labels(self) -> Labels:
        """The layouts' masks are JPEGs or made from such: values near 0 and 255, split at 128."""
        if self.layout != "pairs":
            return Labels(("background", "polyp"), threshold=128)
        if self.threshold is not None:
            return Labels(("background", self.foreground), threshold=self.threshold)
        if self.mask_colours:
            colours = {name: [_colour(text) for text in texts] for name, texts in self.mask_colours.items()}
            ignored = [_colour(text) for text in self.ignore_values]
            return Labels(tuple(colours), colours=_class_of_value(colours, ignored))
        wrong = [value for value in self.ignore_values if not isinstance(value, int)]
        if wrong:
            raise ValueError(f"ignore_values has {wrong[0]!r}, expected whole numbers beside mask_values")
        ignored = [value for value in self.ignore_values if isinstance(value, int)]
        return Labels(tuple(self.mask_values), values=_class_of_value(self.mask_values, ignored))


def _class_of_value(classes: dict[str, list[int]], ignored: Sequence[int]) -> dict[int, int]:
    """ValueError where a value is given twice."""
    meaning: dict[int, int] = {}
    numbered = [*enumerate(classes.values()), (IGNORED_PIXEL, ignored)]
    for number, values in numbered:
        for value in values:
            if value in meaning:
                raise ValueError(f"the mask value {value} is given twice; a value stands for one class")
            meaning[value] = number
    return meaning


def _colour(text: int | str) -> int:
    if not isinstance(text, str) or len(text) != 7 or not text.startswith("#"):
        raise ValueError(f"{text!r} is no colour, expected e.g. '#ff8000'")
    try:
        return int(text[1:], 16)
    except ValueError as error:
        raise ValueError(f"{text!r} is no colour, expected e.g. '#ff8000'") from error


def _polyp_pairs(root: Path, test_sets: Sequence[str]) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, pairs of the test sets). Copies of the benchmark call the folders image or images."""
    tests = root / "TestDataset"
    if not tests.is_dir():
        raise ValueError(f"there is no folder {printable(tests)}; check data.root, or set data.layout")
    there = sorted((path.name for path in tests.iterdir() if path.is_dir()), key=os.fsencode)
    unknown = sorted(set(test_sets) - set(there))
    if unknown:
        raise ValueError(
            f"data.test_sets has {unknown[0]!r}; {printable(tests)} has: {', '.join(there) or 'none'}"
        )
    test = [pair for name in test_sets or there for pair in _singular_or_plural(tests / name)]
    return _singular_or_plural(root / "TrainDataset"), test


def _singular_or_plural(folder: Path) -> list[Pair]:
    images, masks = (folder / one if (folder / one).is_dir() else folder / f"{one}s" for one in ("image", "mask"))
    return find_pairs(images, masks)


def _ade20k_names(path: Path) -> tuple[str, ...]:
    """The first synonym of each class, or all of them where the first names several classes; without it, numbers.

    Lines of number, share, images, images, names.
    """
    if not path.is_file():
        return tuple(str(number) for number in range(1, _ADE20K_CLASSES + 1))
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    synonyms = [line.split("\t")[-1].strip() for line in lines if line.strip()]
    first = [names.split(",")[0].strip() for names in synonyms]
    names = [one if first.count(one) == 1 else every for one, every in zip(first, synonyms, strict=True)]
    if len(names) != _ADE20K_CLASSES or len(set(names)) != _ADE20K_CLASSES:
        raise ValueError(
            f"{printable(path)} names {len(set(names))} different classes, expected {_ADE20K_CLASSES}; restore "
            "the published file, or remove it: the classes are then called by their numbers"
        )
    return tuple(names)
