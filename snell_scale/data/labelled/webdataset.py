"""Labelled images in the shards of a webdataset: .jpg, .png or .webp beside a .cls, read without unpacking."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from snell_scale.data.images import printable
from snell_scale.data.labelled.checks import first_of
from snell_scale.data.labelled.entries import LabelledEntries
from snell_scale.data.labelled.images import SPLITS, FractionsConfig
from snell_scale.data.tar_shards import ShardReader, TarSample, TarShards, shard_paths
from snell_scale.interfaces import DataBundle, Preprocessing

_IMAGES = ("jpg", "jpeg", "png", "webp")
_LABEL = "cls"
Entry = tuple[TarSample, str]


class WebdatasetConfig(FractionsConfig):
    """Tar shards below `root`, each sample an image and its class as a number in a .cls file."""

    name: Literal["webdataset"] = "webdataset"
    train: tuple[str, ...] = Field(
        min_length=1, description="Shards below root, as ['train-{0000..0009}.tar'], or with * and ?."
    )
    validation: tuple[str, ...] = Field(default=(), description="Or validation_fraction.")
    test: tuple[str, ...] = Field(default=(), description="Or test_fraction.")
    classes: tuple[str, ...] = Field(
        default=(), description="Names of the classes, by number; none: as many as the training labels have."
    )

    def describe(self) -> str:
        """A short label for records and tables."""
        return f"webdataset/{printable(Path(self.root).resolve().name)}"

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """Samples in the order of the shards and of the files in them.

        ValueError: no such shard, one that is damaged or in two splits, a sample without image or class, a class
        that is no number or outside of the classes, a class without a training image; what `completed` and
        `bundle` refuse.
        """
        paths = {split: self._paths(getattr(self, split)) for split in SPLITS if getattr(self, split)}
        _check_apart(paths)
        found = {split: _entries(TarShards(shards)) for split, shards in paths.items()}
        labels = found["train"].labels
        names = self.classes or tuple(str(label) for label in range(int(labels.max()) + 1))
        unused = sorted(set(range(len(names))) - set(labels.tolist()))
        if unused:
            raise ValueError(
                f"data.train: no training image has the class {first_of([names[label] for label in unused])}; "
                "classes are numbered from 0 without gaps"
            )
        for split in found.values():
            _check_labels(split, len(names))
        splits = self.completed(found, class_names=names, seed=seed)
        return self.bundle(splits, class_names=names, seed=seed, preprocessing=preprocessing)

    def _paths(self, patterns: Sequence[str]) -> list[Path]:
        paths: list[Path] = []
        for pattern in patterns:
            if not set(pattern) & set("*?["):
                paths += [self.folder / path for path in shard_paths(pattern)]
                continue
            matched = sorted(self.folder.glob(pattern))
            if not matched:
                raise ValueError(f"data.root={self.root} has no shard {pattern}; check the pattern")
            paths += matched
        return paths


def _entries(shards: TarShards) -> LabelledEntries:
    entries: list[Entry] = []
    labels = []
    for sample in shards.samples:
        image = [extension for extension in _IMAGES if extension in sample.members]
        if len(image) != 1 or _LABEL not in sample.members:
            shard = shards.paths[next(iter(sample.members.values())).shard]
            raise ValueError(
                f"{printable(shard)}:{printable(sample.key)} has {', '.join(sorted(sample.members))}, expected "
                f"one image ({', '.join(_IMAGES)}) and a {_LABEL}; write the shard anew"
            )
        entries.append((sample, image[0]))
        text = shards.read(sample.members[_LABEL]).strip()
        if not text.isdigit():
            raise ValueError(
                f"{printable(shards.name(sample, _LABEL))} holds {text[:40]!r}, expected the number of a class"
            )
        labels.append(int(text))
    return LabelledEntries(ShardReader(shards), entries, np.array(labels, dtype=np.int64))


def _check_apart(paths: Mapping[str, Sequence[Path]]) -> None:
    counts = Counter(path.resolve() for shards in paths.values() for path in shards)
    double = [str(path) for path, count in counts.items() if count > 1]
    if double:
        raise ValueError(
            f"{len(double)} shards are named twice in data.{', data.'.join(paths)}: {first_of(double)}; "
            "name each once"
        )


def _check_labels(split: LabelledEntries, num_classes: int) -> None:
    outside = np.flatnonzero(split.labels >= num_classes)
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"{printable(split.reader.name(split.entries[first]))} has the class {split.labels[first]}, expected "
            f"0 to {num_classes - 1} as in the training images; correct it, or name all data.classes"
        )
