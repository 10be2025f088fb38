"""What all data sets of labelled images share: options, samples, and what is done about broken files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch.utils.data import Dataset

from snell_scale.data.config import DataConfig, bundle_of
from snell_scale.data.image_transforms import (
    Augmentation,
    ImageTransform,
    Resizing,
    evaluation_transform,
    training_transform,
)
from snell_scale.data.images import BrokenImage, read_image, rng_of
from snell_scale.data.labelled.checks import readable, stratified_split, tell_of_empty_classes
from snell_scale.data.labelled.entries import LabelledEntries
from snell_scale.interfaces import Batch, DataBundle, InputSpec, Preprocessing, SampleKey

SPLITS = ("train", "validation", "test")


class LabelledImagesConfig(DataConfig):
    """Options of every data set of labelled images on disk."""

    root: str = Field(min_length=1, description="Folder of the data set.")
    image_size: int | None = Field(
        default=None, gt=0, description="Pixels of both sides; null: what the model's weights expect."
    )
    resize: Resizing = Field(
        default="crop", description="crop: the shorter side, then the centre; squash: both sides at once."
    )
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = Field(
        default=None, description="Filter of resizing; null: what the model's weights expect."
    )
    crop_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="What the centre crop keeps of the shorter side; null: what the model's weights expect.",
    )
    augmentation: Augmentation = Field(
        default="crop-flip",
        description="Of training images. crop-flip: random crop of 8-100 % and mirroring; flip; none.",
    )
    rand_augment: int | None = Field(default=None, ge=0, le=30, description="Magnitude of RandAugment.")
    color_jitter: float = Field(default=0.0, ge=0, le=1, description="Brightness, contrast, saturation.")
    skip_broken: bool = Field(
        default=False,
        description="Read every image once before training, and leave out those that cannot be read.",
    )

    @property
    def folder(self) -> Path:
        """`root`. ValueError where it is no folder."""
        path = Path(self.root)
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise ValueError(
                f"data.root={self.root} {what} (looked for from {Path.cwd()}); give the folder of the data set"
            )
        return path

    def input_spec(self, preprocessing: Preprocessing | None) -> InputSpec:
        """What the model's weights expect, changed where this config says so; without that, mean and std are 0.5.

        ValueError where nobody says the size.
        """
        expected = preprocessing.image if preprocessing else None
        if expected is None:
            if self.image_size is None:
                raise ValueError(
                    "data.image_size is not set, and the model does not say which size it expects; set "
                    "data.image_size, e.g. 224"
                )
            expected = InputSpec(3, self.image_size, self.image_size, (0.5,) * 3, (0.5,) * 3)
        changes: dict[str, Any] = {}
        if self.image_size is not None:
            changes = {"height": self.image_size, "width": self.image_size}
        if self.interpolation is not None:
            changes["interpolation"] = self.interpolation
        if self.crop_fraction is not None:
            changes["crop_fraction"] = self.crop_fraction
        return replace(expected, **changes)

    def bundle(
        self,
        splits: Mapping[str, LabelledEntries],
        *,
        class_names: tuple[str, ...],
        seed: int,
        preprocessing: Preprocessing | None,
    ) -> DataBundle:
        """The three splits as data sets; labels are indices into class_names.

        Classes without a training image, which some benchmarks have, are named on stderr. ValueError: an empty
        split, or broken files with nothing left; see `input_spec` too.
        """
        spec = self.input_spec(preprocessing)
        skipped: list[str] = []
        if self.skip_broken:
            splits, skipped = readable(splits, channels=spec.channels)
        for name in SPLITS:
            if not splits[name].entries:
                raise ValueError(
                    f"data.root={self.root}: the {name} split has no image; add some, or change the split"
                )
        tell_of_empty_classes(splits["train"].labels, class_names)
        transforms = self._transforms(spec)
        datasets = {
            name: LabelledImages(splits[name], transforms[name], channels=spec.channels, seed=seed)
            for name in SPLITS
        }
        return bundle_of(
            datasets,
            class_names=class_names,
            input_spec=spec,
            fields={"image", "label", "index"},
            skipped=skipped,
        )

    def _transforms(self, spec: InputSpec) -> dict[str, ImageTransform]:
        training = training_transform(
            spec,
            resizing=self.resize,
            augmentation=self.augmentation,
            rand_augment=self.rand_augment,
            color_jitter=self.color_jitter,
        )
        plain = evaluation_transform(spec, resizing=self.resize)
        return {"train": training, "validation": plain, "test": plain}


class FractionsConfig(LabelledImagesConfig):
    """A data set that may come without some of its splits: these are then shares of the training images."""

    validation_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of each class, where there is no split for it."
    )
    test_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of each class, where there is no split for it."
    )

    def completed(
        self, found: Mapping[str, LabelledEntries], *, class_names: tuple[str, ...], seed: int
    ) -> dict[str, LabelledEntries]:
        """Three splits from those found, "train" among them; the others are held out of it, class by class.

        ValueError: a split is missing and its fraction not set, or a class has too few images.
        """
        missing = [name for name in ("test", "validation") if name not in found]
        fractions = {name: getattr(self, f"{name}_fraction") for name in missing}
        for name, fraction in fractions.items():
            if fraction is None:
                raise ValueError(
                    f"data.root={self.root} has no {name} split; make one, or set data.{name}_fraction "
                    "(e.g. 0.1) to hold out a share of the training images"
                )
        if sum(fractions.values()) >= 1:
            raise ValueError(
                "data.validation_fraction and data.test_fraction leave nothing to train on; lower them"
            )
        parts = stratified_split(found["train"].labels, fractions, class_names=class_names, seed=seed)
        return {**found, **{name: found["train"].take(indices) for name, indices in parts.items()}}


class LabelledImages(Dataset[Batch]):
    """One split, read from disk when looked up by (index, epoch).

    Samples: {"image": (C, H, W) float32, "label": () int64, "index": () int64}. BrokenImage where a file
    cannot be read. Can be pickled, for DataLoader workers.
    """

    def __init__(self, samples: LabelledEntries, transform: ImageTransform, *, channels: int, seed: int) -> None:
        self.samples = samples
        self._transform = transform
        self._channels = channels
        self._seed = seed

    def __len__(self) -> int:
        return len(self.samples.entries)

    def __getitem__(self, key: SampleKey) -> Batch:
        index, _ = key
        reader, entry = self.samples.reader, self.samples.entries[index]
        try:
            image = read_image(reader.content(entry), name=reader.name(entry), channels=self._channels)
        except BrokenImage as error:
            raise BrokenImage(
                f"{error}; or set data.skip_broken=true to leave out what cannot be read"
            ) from error
        return {
            "image": self._transform(image, rng_of(self._seed, key)),
            "label": torch.tensor(int(self.samples.labels[index])),
            "index": torch.tensor(index),
        }
