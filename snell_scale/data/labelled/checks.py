"""Checks of a whole data set of images before training: what is listed, what can be read, what is where."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from snell_scale.data.images import BrokenImage, printable, read_image
from snell_scale.data.labelled.entries import LabelledEntries
from snell_scale.data.reading import ReadingProgress, is_first_rank, problems_of

_SHOWN = 5


def readable(
    splits: Mapping[str, LabelledEntries], *, channels: int
) -> tuple[dict[str, LabelledEntries], list[str]]:
    """The splits without the images that cannot be read, and the names of these; every image is read once.

    Says on stderr how far it is, and what is left out.
    """
    progress = ReadingProgress(sum(len(split.entries) for split in splits.values()))
    kept, skipped = {}, []
    for name, split in splits.items():

        def problem(entry: object, split: LabelledEntries = split) -> str | None:
            try:
                read_image(split.reader.content(entry), name=split.reader.name(entry), channels=channels)
            except BrokenImage as error:
                return str(error)
            return None

        messages = problems_of(split.entries, problem, progress)
        kept[name] = split.take(np.flatnonzero([message is None for message in messages]))
        wrong = [entry for entry, message in zip(split.entries, messages, strict=True) if message]
        skipped += [printable(split.reader.name(entry)) for entry in wrong]
    progress.close()
    return kept, skipped


def check_present(folder: Path, paths: Sequence[str], *, where: str) -> None:
    """ValueError, with the first few names, where files listed in `where` are not there; one look per folder."""
    contents: dict[Path, set[str]] = {}
    absent = []
    for path in paths:
        parent, name = (folder / path).parent, Path(path).name
        if parent not in contents:
            contents[parent] = set(os.listdir(parent)) if parent.is_dir() else set()
        if name not in contents[parent]:
            absent.append(path)
    if absent:
        raise ValueError(
            f"{printable(where)} lists {len(absent)} of {len(paths)} images that are not in {printable(folder)}: "
            f"{first_of(absent)}; complete the data set, or set data.skip_broken=true to leave them out"
        )


def check_inside(path: str, *, where: str) -> str:
    """`path` as it is. ValueError where it is absolute or leads out of the folder that it is relative to."""
    if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir:
        raise ValueError(f"{printable(where)}: {printable(path)} leads out of the data set; list relative paths")
    return path


def check_disjoint(splits: Mapping[str, LabelledEntries]) -> None:
    """ValueError where one image is in two splits: what is trained on must not be tested on."""
    names = list(splits)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            both = sorted(set(splits[first].entries) & set(splits[second].entries))
            if both:
                raise ValueError(
                    f"{len(both)} images are in the {first} split and in the {second} split: {first_of(both)}; "
                    "list each image once"
                )


def stratified_split(
    labels: np.ndarray, fractions: Mapping[str, float], *, class_names: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    """Indices of "train" and of each held-out part, from every class its share, at least one image.

    A class is shuffled by (seed, class) alone: other classes do not change its split. ValueError names a class
    that is too small.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*fractions, "train")}
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        counts = [max(1, round(fraction * len(members))) for fraction in fractions.values()]
        if sum(counts) >= len(members):
            raise ValueError(
                f"class {class_names[label]!r} has {len(members)} image(s), too few to hold out "
                f"{' and '.join(fractions)} images and to train; add images, remove the class, or change "
                f"{' and '.join(f'data.{name}_fraction' for name in fractions)}"
            )
        shuffled = np.random.default_rng([seed, int(label)]).permutation(members)
        for part, indices in zip(parts.values(), np.split(shuffled, np.cumsum(counts)), strict=True):
            part.append(indices)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def tell_of_empty_classes(labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Names, on rank 0's stderr, the classes without a training image."""
    empty = [class_names[label] for label in sorted(set(range(len(class_names))) - set(labels.tolist()))]
    if empty and is_first_rank():
        print(
            f"data: {len(empty)} of {len(class_names)} classes have no training image: {first_of(empty)}; they "
            "will not be recognised",
            file=sys.stderr,
        )


def first_of(names: Sequence[str]) -> str:
    """The first few of many names."""
    shown = ", ".join(printable(name) for name in names[:_SHOWN])
    return f"{shown}, …" if len(names) > _SHOWN else shown
