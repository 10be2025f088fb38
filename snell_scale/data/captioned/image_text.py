"""Image-text pairs from the user's disk: CSV lists, webdataset shards, Hugging Face data sets."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from snell_scale.data.captioned.sources import Columns, PairSource, read_csv, read_hf, read_webdataset
from snell_scale.data.captioned.splits import (
    SPLITS,
    check_pairs,
    class_names_of,
    labels_of,
    split_by_images,
    usable,
)
from snell_scale.data.config import DataConfig, bundle_of
from snell_scale.data.image_transforms import ImageTransform, evaluation_transform
from snell_scale.data.images import BrokenImage, read_image, rng_of
from snell_scale.interfaces import Batch, DataBundle, InputSpec, Preprocessing, SampleKey

Paths = str | tuple[str, ...]


class ImageTextConfig(DataConfig):
    """Images with captions: a CSV list, webdataset shards, or a Hugging Face data set saved to disk."""

    name: Literal["image_text"] = "image_text"
    format: Literal["csv", "webdataset", "hf"] = Field(
        description="csv: a list of image files and captions; webdataset: tar shards; hf: a folder that "
        "datasets' save_to_disk wrote."
    )
    source: Paths | None = Field(
        default=None,
        description="What all splits are taken from, by the fractions; shards may be shard-{000..009}.tar.",
    )
    train: Paths | None = Field(default=None, description="The training pairs; with validation and test.")
    validation: Paths | None = None
    test: Paths | None = None
    validation_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the source's images."
    )
    test_fraction: float | None = Field(default=None, gt=0, lt=1, description="Share of the source's images.")
    image_column: str | None = Field(default=None, description="null: filepath (csv), image (hf).")
    caption_column: str | None = Field(
        default=None, description="Column or JSON key; null: title (csv), caption (hf, JSON)."
    )
    label_column: str | None = Field(
        default=None, description="Column or JSON key of the class's name or number, for zero-shot evaluation."
    )
    image_id_column: str | None = Field(
        default=None, description="Equal for captions of one image; null: its path (csv), the row (hf)."
    )
    separator: str | None = Field(
        default=None, min_length=1, max_length=1, description="Of a CSV; null: tab for .tsv, else a comma."
    )
    class_names: tuple[str, ...] = Field(
        default=(), description="In the order of the labels' numbers; empty: the labels are the names."
    )
    image_size: int | None = Field(
        default=None, gt=0, description="Pixels of both sides; null: what the model's weights expect."
    )
    crop_scale: tuple[float, float] = Field(
        default=(0.9, 1.0),
        description="Share of the area that a training image's random crop keeps, from and to.",
    )
    skip_broken: bool = Field(
        default=False,
        description="Read every image once before training; leave out what cannot be read or has no caption.",
    )

    @model_validator(mode="after")
    def _check(self) -> "ImageTextConfig":
        given = [name for name in SPLITS if getattr(self, name) is not None]
        fractions = (self.validation_fraction, self.test_fraction)
        if self.source is None and len(given) < len(SPLITS):
            raise ValueError(
                "give train, validation and test, or source with validation_fraction and test_fraction"
            )
        if self.source is not None and (given or None in fractions):
            raise ValueError(
                "source takes validation_fraction and test_fraction, and no train, validation or test"
            )
        if self.source is None and fractions != (None, None):
            raise ValueError(
                "validation_fraction and test_fraction are shares of source: remove them, or give source"
            )
        if sum(fraction or 0 for fraction in fractions) >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on; lower them")
        self._check_columns()
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale={[low, high]}, expected two shares of the area, the smaller one first")
        return self

    def _check_columns(self) -> None:
        """What a format does not read is refused rather than left unread."""
        unread = {"webdataset": ("image_column", "image_id_column", "separator"), "hf": ("separator",)}
        given = [key for key in unread.get(self.format, ()) if getattr(self, key) is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: format={self.format} has no such thing; remove the key")

    def describe(self) -> str:
        """A short label for records and tables."""
        paths = self.source or self.train or ""
        return f"{self.name}({Path(paths if isinstance(paths, str) else paths[0]).name})"

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """Three splits without a common image; those of `source` are chosen by `seed`.

        ValueError names the file or line: see `pair_sources`; also an empty caption, a split without pairs, a
        label outside the classes. Without skip_broken, images are read when they are looked up.
        """
        tokenize = preprocessing.tokenize if preprocessing else None
        spec = self._input_spec(preprocessing)
        splits, skipped = self._splits(seed), []
        if self.skip_broken:
            splits, skipped = usable(splits, channels=spec.channels)
        check_pairs(splits)
        class_names = class_names_of(splits, self.class_names)
        if self.label_column is not None and not class_names:
            raise ValueError(
                f"data.label_column={self.label_column}: no pair has such a label; correct the name, or remove it"
            )
        captions = tuple(dict.fromkeys(pair.caption for split in splits.values() for pair in split.pairs))
        tokens = tokenize(captions).to(torch.int32) if tokenize else None
        datasets = {
            name: ImageTextSplit(
                split,
                transform=_transform(spec, self.crop_scale if name == "train" else None),
                spec=spec,
                seed=seed,
                labels=labels_of(split.pairs, class_names) if class_names else None,
                captions=captions,
                tokens=tokens,
            )
            for name, split in splits.items()
        }
        return bundle_of(
            datasets,
            class_names=class_names,
            input_spec=spec,
            fields=datasets["train"].fields,
            captions=captions,
            skipped=skipped,
        )

    def _input_spec(self, preprocessing: Preprocessing | None) -> InputSpec:
        expected = preprocessing.image if preprocessing else None
        if expected is not None:
            size = self.image_size
            return expected if size is None else replace(expected, height=size, width=size)
        if self.image_size is None:
            raise ValueError(
                "data.image_size is not set, and the model does not say which size it expects; set it"
            )
        return InputSpec(3, self.image_size, self.image_size, (0.5,) * 3, (0.5,) * 3)

    def _splits(self, seed: int) -> dict[str, PairSource]:
        if self.source is None:
            return {name: self._read(getattr(self, name)) for name in SPLITS}
        assert self.validation_fraction is not None
        assert self.test_fraction is not None
        shares = {"validation": self.validation_fraction, "test": self.test_fraction}
        return split_by_images(self._read(self.source), shares, seed=seed)

    def _read(self, paths: Paths) -> PairSource:
        columns = Columns(self.image_column, self.caption_column, self.label_column, self.image_id_column)
        paths = (paths,) if isinstance(paths, str) else paths
        if self.format == "webdataset":
            return read_webdataset(paths, columns)
        if len(paths) != 1:
            raise ValueError(f"data.format={self.format} takes one path for each split, got {len(paths)}")
        path = Path(paths[0])
        if self.format == "hf":
            return read_hf(path, columns)
        return read_csv(path, columns, separator=self.separator, needs_images=not self.skip_broken)


class ImageTextSplit(Dataset[Batch]):
    """One split, a pair for each index; images are read when looked up by (index, epoch). Can be pickled.

    labels: (N,) int64; captions: all that there are; tokens: (captions, length) int32.
    BrokenImage where an image cannot be read.
    """

    def __init__(
        self,
        source: PairSource,
        *,
        transform: ImageTransform,
        spec: InputSpec,
        seed: int,
        labels: Tensor | None,
        captions: Sequence[str],
        tokens: Tensor | None,
    ) -> None:
        self._reader = source.reader
        self._entries = [pair.entry for pair in source.pairs]
        numbers = {caption: number for number, caption in enumerate(captions)}
        self._captions = torch.tensor([numbers[pair.caption] for pair in source.pairs])
        images = {pair.image_id: number for number, pair in enumerate(source.pairs)}
        self._image_ids = torch.tensor([images[pair.image_id] for pair in source.pairs])
        self._labels, self._tokens = labels, tokens
        self._transform, self._channels, self._seed = transform, spec.channels, seed

    @property
    def fields(self) -> frozenset[str]:
        """The entries of a sample."""
        found = {"image", "index", "image_id", "caption"}
        found |= set() if self._labels is None else {"label"}
        return frozenset(found | (set() if self._tokens is None else {"text"}))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, key: SampleKey) -> Batch:
        index, _ = key
        entry = self._entries[index]
        try:
            image = read_image(
                self._reader.content(entry), name=self._reader.name(entry), channels=self._channels
            )
        except BrokenImage as error:
            raise BrokenImage(
                f"{error}; or set data.skip_broken=true to leave out what cannot be read"
            ) from error
        sample = {
            "image": self._transform(image, rng_of(self._seed, key)),
            "caption": self._captions[index],
            "image_id": self._image_ids[index],
            "index": torch.tensor(index),
        }
        if self._labels is not None:
            sample["label"] = self._labels[index]
        if self._tokens is not None:
            sample["text"] = self._tokens[self._captions[index]].long()
        return sample


def _transform(spec: InputSpec, crop_scale: tuple[float, float] | None) -> ImageTransform:
    """For training, a random crop of so much of the area, as open_clip trains; else the centre of the image."""
    if crop_scale is None:
        return evaluation_transform(spec, resizing="crop")
    crop = v2.RandomResizedCrop(
        (spec.height, spec.width), scale=crop_scale, interpolation=InterpolationMode(spec.interpolation)
    )
    return ImageTransform([crop], spec, is_random=True)
