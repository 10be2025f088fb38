"""FGVC: five fine-grained data sets, in the layout of JSON lists that published runs use.

<root>/<set>/{train,val,test}.json = {image: class}. Lists: github.com/KMnP/vpt; read as
github.com/ssfgunner/SNELL @ e9d5185 : lib/datasets.py does.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from snell_scale.data.labelled.checks import check_disjoint, check_inside, check_present, first_of
from snell_scale.data.labelled.entries import FileReader, LabelledEntries
from snell_scale.data.labelled.images import FractionsConfig
from snell_scale.interfaces import DataBundle, Preprocessing

ClassId = int | str

# Set → (folder of the images within it, spellings of its own folder).
_SETS = {
    "cub": ("images", ("cub", "CUB_200_2011")),
    "nabirds": ("images", ("nabirds", "NABirds")),
    "flowers": ("", ("flowers", "oxfordflower", "OxfordFlowers")),
    "dogs": ("Images", ("dogs", "stanforddog", "Stanford-dogs")),
    "cars": ("", ("cars", "stanfordcar", "Stanford-cars")),
}


class FgvcConfig(FractionsConfig):
    """One of the five FGVC sets; without a val.json a share of the training images chooses."""

    name: Literal["fgvc"] = "fgvc"
    set: Literal["cub", "nabirds", "flowers", "dogs", "cars"]

    def describe(self) -> str:
        """A short label for records and tables."""
        return f"fgvc/{self.set}"

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """The set's splits; label k is the k-th class id of train.json, sorted.

        ValueError: no such folder or list, a list that is no {image: class}, a class that train.json has not, a
        path that leads out of the images' folder or to no file, an image in two splits; what `completed` and
        `bundle` refuse.
        """
        folder = self._set_folder()
        lists = {"train": "train.json", "validation": "val.json", "test": "test.json"}
        if not (folder / "val.json").is_file():
            del lists["validation"]
        read = {split: _read(folder / name) for split, name in lists.items()}
        classes = _sorted_ids(read["train"], folder / "train.json")
        splits = {
            split: self._entries(folder, listed, classes, where=str(folder / lists[split]))
            for split, listed in read.items()
        }
        check_disjoint(splits)
        names = tuple(str(name) for name in classes)
        splits = self.completed(splits, class_names=names, seed=seed)
        return self.bundle(splits, class_names=names, seed=seed, preprocessing=preprocessing)

    def _set_folder(self) -> Path:
        spellings = _SETS[self.set][1]
        for spelling in spellings:
            if (self.folder / spelling).is_dir():
                return self.folder / spelling
        raise ValueError(
            f"data.root={self.root} has no folder of {self.set}; expected one of {', '.join(spellings)} in it, "
            "with train.json and test.json"
        )

    def _entries(
        self, folder: Path, listed: dict[str, ClassId], classes: list[ClassId], *, where: str
    ) -> LabelledEntries:
        label_of = {name: label for label, name in enumerate(classes)}
        strange = [f"{path} (class {name})" for path, name in listed.items() if name not in label_of]
        if strange:
            raise ValueError(
                f"{where} has {len(strange)} images of classes that train.json has not: {first_of(strange)}; "
                "correct the list"
            )
        images = folder / _SETS[self.set][0]
        paths = [check_inside(path, where=where) for path in listed]
        if not self.skip_broken:
            check_present(images, paths, where=where)
        labels = np.array([label_of[name] for name in listed.values()], dtype=np.int64)
        return LabelledEntries(FileReader(images), paths, labels)


def _read(path: Path) -> dict[str, ClassId]:
    try:
        listed: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; the FGVC lists come with it, put it there") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; copy it again from its origin") from None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path} holds no list of images, expected {{image: class}}")
    for image, name in listed.items():
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise ValueError(f"{path}: {image} has the class {name!r}, expected a number or a name")
    return listed


def _sorted_ids(listed: dict[str, ClassId], path: Path) -> list[ClassId]:
    """Numbers by size, names as text, as the published loader sorts them."""
    kinds = {type(name).__name__ for name in listed.values()}
    if len(kinds) > 1:
        raise ValueError(f"{path} has classes that are numbers and classes that are text; write them all alike")
    return sorted(set(listed.values()), key=lambda name: (name, "") if isinstance(name, int) else (0, name))
