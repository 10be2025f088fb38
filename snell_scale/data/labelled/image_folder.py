"""One folder per class: <root>/{train,val,test}/<class>/*.jpg, or <root>/<class>/*.jpg with stated shares."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from snell_scale.data.images import SUFFIXES, printable
from snell_scale.data.labelled.checks import first_of
from snell_scale.data.labelled.entries import FileReader, LabelledEntries
from snell_scale.data.labelled.images import FractionsConfig
from snell_scale.interfaces import DataBundle, Preprocessing

_SPELLINGS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}


class ImageFolderConfig(FractionsConfig):
    """Images in a folder per class; labels follow from the sorted names of the folders."""

    name: Literal["image_folder"] = "image_folder"

    def describe(self) -> str:
        """A short label for records and tables."""
        return f"image_folder/{printable(Path(self.root).resolve().name)}"

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """Images at any depth below a class's folder, in the order of their names; hidden files do not count.

        ValueError: no folders of classes, fewer than two, a class without an image, a class that the training
        split has not, a folder that contains itself through a link; what `completed` and `bundle` refuse.
        """
        folders = self._split_folders()
        classes = _classes(folders["train"])
        found = {split: _entries(folder, classes) for split, folder in folders.items()}
        splits = self.completed(found, class_names=classes, seed=seed)
        names = tuple(printable(name) for name in classes)
        return self.bundle(splits, class_names=names, seed=seed, preprocessing=preprocessing)

    def _split_folders(self) -> dict[str, Path]:
        """Folder of each split that has one; the root itself where its folders are the classes."""
        present = {
            split: [self.folder / name for name in names if (self.folder / name).is_dir()]
            for split, names in _SPELLINGS.items()
        }
        double = next((paths for paths in present.values() if len(paths) > 1), None)
        if double:
            raise ValueError(f"{double[0]} and {double[1]} are both there for one split; keep one of them")
        if not present["train"]:
            return {"train": self.folder}
        spelled = {name for names in _SPELLINGS.values() for name in names}
        others = [path.name for path in _subfolders(self.folder) if path.name not in spelled]
        if others:
            raise ValueError(
                f"data.root={self.root} has a folder train and beside it {first_of(others)}: are these classes, "
                "or is train a split? Put the classes into train (and val and test), or rename the class train"
            )
        return {split: paths[0] for split, paths in present.items() if paths}


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(path.name for path in _subfolders(folder))
    if len(names) < 2:
        found = f"one, {printable(names[0])}" if names else "none"
        raise ValueError(
            f"{printable(folder)} has {found}, expected at least two folders of classes with images in each; a "
            "split is a folder named train, val or test"
        )
    return names


def _entries(folder: Path, classes: tuple[str, ...]) -> LabelledEntries:
    strange = sorted({path.name for path in _subfolders(folder)} - set(classes))
    if strange:
        raise ValueError(
            f"{printable(folder)} has {len(strange)} classes that the training images have not: "
            f"{first_of(strange)}; move their images, or add such classes to the training images"
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue  # of the training split all are there; another may lack one
        images = [str(path.relative_to(folder)) for path in _images(folder / name, above=())]
        if not images:
            raise ValueError(
                f"{printable(folder / name)} has no image ({', '.join(sorted(SUFFIXES))}); add some, or "
                "remove the folder"
            )
        paths += images
        labels += [label] * len(images)
    return LabelledEntries(FileReader(folder), paths, np.array(labels, dtype=np.int64))


def _images(folder: Path, *, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Links are followed, as data sets are often made of them; one that leads back up is an error."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ValueError(f"{printable(folder)} is a link to a folder that it is in; remove the link")
    for item in sorted(os.scandir(folder), key=lambda item: item.name):
        if item.name.startswith("."):
            continue
        if os.path.isdir(item.path):  # False, where DirEntry raises, for a link to itself
            yield from _images(Path(item.path), above=(*above, identity))
        elif Path(item.name).suffix.lower() in SUFFIXES:
            yield Path(item.path)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
