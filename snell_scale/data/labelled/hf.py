"""Data sets that the `datasets` library saved on disk (`save_to_disk`), with an image and a label column."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from snell_scale.data.images import BrokenImage, printable
from snell_scale.data.labelled.entries import LabelledEntries
from snell_scale.data.labelled.images import FractionsConfig
from snell_scale.interfaces import DataBundle, Preprocessing

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


class HfDatasetConfig(FractionsConfig):
    """A folder that `datasets.load_from_disk` opens: one data set, or one per split."""

    name: Literal["hf_dataset"] = "hf_dataset"
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = Field(default="train", description="Name of the split that trains.")
    validation_split: str = Field(default="validation", description="If there is none: validation_fraction.")
    test_split: str = Field(default="test", description="If there is none: test_fraction.")

    def describe(self) -> str:
        """A short label for records and tables."""
        return f"hf_dataset/{printable(Path(self.root).resolve().name)}"

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """Class names are those of a ClassLabel column, or the sorted labels of the training split.

        ValueError: `datasets` is not installed, the folder is not one that it saved, a column or split is not
        there, a row has no label or one that no training row has; what `completed` and `bundle` refuse.
        """
        tables = self._tables()
        for table in tables.values():
            self._check_columns(table)
        classes = self._classes(tables["train"])
        found = {split: self._entries(table, classes, split) for split, table in tables.items()}
        names = tuple(str(name) for name in classes)
        splits = self.completed(found, class_names=names, seed=seed)
        return self.bundle(splits, class_names=names, seed=seed, preprocessing=preprocessing)

    def _tables(self) -> "dict[str, Dataset]":
        """Split → table, for those that are there; "train" is."""
        loaded = _load(self.folder)
        if not isinstance(loaded, dict):
            return {"train": loaded}
        names = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        if self.train_split not in loaded:
            raise ValueError(
                f"data.train_split is {self.train_split!r}, but {self.root} has the splits "
                f"{', '.join(map(str, loaded))}; name one of them"
            )
        if len(set(names.values())) < len(names):
            raise ValueError(
                f"data.train_split, validation_split and test_split are {', '.join(names.values())}: "
                "name three different ones"
            )
        return {split: loaded[name] for split, name in names.items() if name in loaded}

    def _check_columns(self, table: "Dataset") -> None:
        for key in ("image_column", "label_column"):
            if getattr(self, key) not in table.column_names:
                raise ValueError(
                    f"data.{key} is {getattr(self, key)!r}, but {self.root} has the columns "
                    f"{', '.join(table.column_names)}; name one of them"
                )

    def _classes(self, table: "Dataset") -> list[Any]:
        names = getattr(table.features[self.label_column], "names", None)
        if names is not None:
            return list(names)
        labels = {label for label in table[self.label_column] if label is not None}
        kinds = {type(label) for label in labels}
        if kinds not in ({int}, {str}):
            raise ValueError(
                f"data.label_column={self.label_column} holds {table.features[self.label_column]}, expected "
                "whole numbers or names, one for each image"
            )
        return sorted(labels)

    def _entries(self, table: "Dataset", classes: list[Any], split: str) -> LabelledEntries:
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        where = f"{self.root} ({split})"
        is_numbered = isinstance(table.features[self.label_column], ClassLabel)
        label_of = {label if is_numbered else name: label for label, name in enumerate(classes)}
        labels = list(table[self.label_column])
        for row, label in enumerate(labels):
            if label not in label_of:
                raise ValueError(
                    f"{where}, row {row}: the label is {label!r}, which is no class of the training split; "
                    "correct it, or drop the row"
                )
        images = table.select_columns([self.image_column])
        if isinstance(images.features[self.image_column], ImageFeature):
            images = images.cast_column(self.image_column, ImageFeature(decode=False))
        reader = _TableReader(images, self.image_column, where)
        return LabelledEntries(reader, range(len(images)), np.array([label_of[label] for label in labels]))


@dataclass(frozen=True)
class _TableReader:
    """An entry is the number of a row."""

    table: "Dataset"
    column: str
    where: str

    def name(self, entry: int) -> str:
        return f"{self.where}, row {entry}"

    def content(self, entry: int) -> Path | bytes:
        value = self.table[int(entry)][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return Path(value)
        if isinstance(value, bytes):
            return value
        raise BrokenImage(f"{self.name(entry)} holds no image but {type(value).__name__}; drop the row")


def _load(folder: Path) -> "Dataset | DatasetDict":
    try:
        from datasets import load_from_disk
    except ImportError:
        raise ValueError(
            "data.name=hf_dataset needs the datasets library: pip install snell-scale[data]"
        ) from None
    try:
        return load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data.root={folder} is not what datasets' save_to_disk writes, or damaged ({error}); save it again"
        ) from error
