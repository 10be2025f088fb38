"""Which image-text pairs a split holds, and what is checked of them before training."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from snell_scale.data.captioned.sources import Pair, PairSource
from snell_scale.data.images import printable
from snell_scale.data.labelled.checks import first_of, readable
from snell_scale.data.labelled.entries import LabelledEntries

SPLITS = ("train", "validation", "test")


def split_by_images(source: PairSource, shares: Mapping[str, float], *, seed: int) -> dict[str, PairSource]:
    """ "train" and each held-out share of the images, at least one, chosen by `seed`; captions go with images.

    ValueError where nothing is left to train on.
    """
    images = list(dict.fromkeys(pair.image_id for pair in source.pairs))
    counts = [max(1, round(share * len(images))) for share in shares.values()]
    if sum(counts) >= len(images):
        raise ValueError(
            f"data.source has {len(images)} image(s), too few to hold out {' and '.join(shares)} images and to "
            f"train; add images, or change {' and '.join(f'data.{name}_fraction' for name in shares)}"
        )
    order = np.random.default_rng(seed).permutation(len(images))
    parts = np.split(order, np.cumsum(counts))
    split_of = {
        images[index]: name
        for name, part in zip((*shares, "train"), parts, strict=True)
        for index in part.tolist()
    }
    return {
        name: source._replace(pairs=[pair for pair in source.pairs if split_of[pair.image_id] == name])
        for name in ("train", *shares)
    }


def usable(splits: Mapping[str, PairSource], *, channels: int) -> tuple[dict[str, PairSource], list[str]]:
    """The splits without pairs whose image cannot be read or whose caption is empty, and the names of these.

    Every image is read once; see `readable`.
    """
    images = {
        name: {split.reader.name(pair.entry): pair.entry for pair in split.pairs}
        for name, split in splits.items()
    }
    listed = {
        name: LabelledEntries(split.reader, list(images[name].values()), np.arange(len(images[name])))
        for name, split in splits.items()
    }
    readable_entries, skipped = readable(listed, channels=channels)
    kept = {}
    for name, split in splits.items():
        good = {split.reader.name(entry) for entry in readable_entries[name].entries}
        pairs = [pair for pair in split.pairs if split.reader.name(pair.entry) in good]
        kept[name] = split._replace(pairs=[pair for pair in pairs if pair.caption.strip()])
        skipped += [f"{printable(pair.where)} (no caption)" for pair in pairs if not pair.caption.strip()]
    return kept, skipped


def check_pairs(splits: Mapping[str, PairSource]) -> None:
    """ValueError: an empty split, an empty caption, an image in two splits."""
    for name, split in splits.items():
        if not split.pairs:
            raise ValueError(
                f"the {name} split has no pair of an image and a caption; add some, or change the split"
            )
        empty = [pair.where for pair in split.pairs if not pair.caption.strip()]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(split.pairs)} captions of the {name} split are empty: {first_of(empty)}; "
                "write them, or set data.skip_broken=true to leave these pairs out"
            )
    names = list(splits)
    for first, second in ((a, b) for position, a in enumerate(names) for b in names[position + 1 :]):
        both = {pair.image_id for pair in splits[first].pairs} & {pair.image_id for pair in splits[second].pairs}
        if both:
            raise ValueError(
                f"{len(both)} images are in the {first} split and in the {second} split: {first_of(sorted(both))}"
                "; list each image in one of them"
            )


def class_names_of(splits: Mapping[str, PairSource], configured: tuple[str, ...]) -> tuple[str, ...]:
    """What labels stand for: as configured, as the data say, or the labels themselves; () without labels.

    ValueError: names without labels, or mere numbers without names, which no sentence can be made of.
    """
    found = {pair.label for split in splits.values() for pair in split.pairs} - {None}
    if not found and configured:
        raise ValueError(
            "data.class_names is set, but the pairs have no labels; set data.label_column, or remove it"
        )
    known = configured or next(iter(splits.values())).class_names
    if not found or known:
        return known if found else ()
    names = sorted(str(label) for label in found)
    if all(name.isdigit() for name in names):
        raise ValueError(
            f"the labels are numbers, {first_of(names)}; set data.class_names to what they stand for"
        )
    return tuple(names)


def labels_of(pairs: Sequence[Pair], class_names: Sequence[str]) -> Tensor:
    """(N,) int64. ValueError names the pair whose label is missing, no class's name and no class's number."""
    numbers = {str(number): number for number in range(len(class_names))}
    numbers |= {name: number for number, name in enumerate(class_names)}
    for pair in pairs:
        if pair.label not in numbers:
            raise ValueError(
                f"{printable(pair.where)} has label {pair.label!r}, expected one of the {len(class_names)} "
                f"classes {first_of(class_names)} or its number; correct it, or set data.class_names"
            )
    return torch.tensor([numbers[str(pair.label)] for pair in pairs])
