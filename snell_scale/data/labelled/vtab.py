"""VTAB-1k: 19 tasks of 800 + 200 images, in the layout of text lists that published runs use.

<root>/<task>/{train800,val200,train800val200,test}.txt with lines "relative/path label". The benchmark: Zhai et
al., arXiv 1910.04867; images and lists as files: github.com/dongzelian/SSF; read as github.com/ssfgunner/SNELL
@ e9d5185 : lib/datasets.py does.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from snell_scale.data.image_transforms import Augmentation, Resizing
from snell_scale.data.images import printable
from snell_scale.data.labelled.checks import check_disjoint, check_inside, check_present
from snell_scale.data.labelled.entries import FileReader, LabelledEntries
from snell_scale.data.labelled.images import LabelledImagesConfig
from snell_scale.interfaces import DataBundle, Preprocessing
from snell_scale.registry import nearest

# Task → number of classes, in the published order: 7 natural, 4 specialized, 8 structured.
TASKS = {
    "cifar": 100,
    "caltech101": 102,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
_VALIDATION, _TEST = "val200", "test"


class VtabConfig(LabelledImagesConfig):
    """One task of VTAB-1k: 800 images train, 200 others choose, the task's whole test split reports."""

    name: Literal["vtab"] = "vtab"
    task: str = Field(description="One of the 19, e.g. cifar.")
    train_on: Literal["train800", "train800val200"] = Field(
        default="train800",
        description="train800val200: all 1,000 images, as published; nothing is left to choose on, so only with "
        "evaluation.protocol=best-test.",
    )
    resize: Resizing = "squash"
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = "bicubic"
    augmentation: Augmentation = "none"

    @field_validator("task")
    @classmethod
    def _is_known(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"data.task is {task!r}, {nearest(task, list(TASKS))}")
        return task

    def describe(self) -> str:
        """A short label for records and tables."""
        return f"vtab/{self.task}"

    def check_run(self, config: Any) -> None:
        """ValueError where the images that would choose the best step are trained on."""
        if self.train_on == "train800val200" and config.evaluation.protocol != "best-test":
            raise ValueError(
                "data.train_on=train800val200 trains on the validation images, which therefore cannot choose the "
                "best step; set data.train_on=train800, or evaluation.protocol=best-test (published, optimistic)"
            )

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """The task's splits; with train800val200 the validation images are among the training images.

        ValueError: no such folder or list, a line that is no "path label", a label outside the task's classes, a
        path that leads out of the task's folder or to no file, an image in two splits; what `bundle` refuses.
        """
        folder = self.folder / self.task
        if not folder.is_dir():
            raise ValueError(
                f"data.root={self.root} has no folder {self.task}; expected <root>/<task>/train800.txt"
            )
        lists = {"train": self.train_on, "validation": _VALIDATION, "test": _TEST}
        splits = {split: self._read(folder, f"{name}.txt") for split, name in lists.items()}
        trained_twice = self.train_on == "train800val200"
        check_disjoint(
            {name: split for name, split in splits.items() if name != "validation" or not trained_twice}
        )
        names = tuple(str(label) for label in range(TASKS[self.task]))
        return self.bundle(splits, class_names=names, seed=seed, preprocessing=preprocessing)

    def _read(self, folder: Path, list_name: str) -> LabelledEntries:
        path = folder / list_name
        if not path.is_file():
            raise ValueError(f"there is no {path}; VTAB-1k comes with it, put it back")
        paths, labels = [], []
        # As the file system spells names, so that those that are no UTF-8 are found.
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                entry, label = _parsed(line, where)
                if not 0 <= label < TASKS[self.task]:
                    raise ValueError(
                        f"{where}: label {label}, expected 0 to {TASKS[self.task] - 1}: {self.task} has "
                        f"{TASKS[self.task]} classes; correct the line"
                    )
                paths.append(check_inside(entry, where=where))
                labels.append(label)
        if not self.skip_broken:
            check_present(folder, paths, where=str(path))
        return LabelledEntries(FileReader(folder), paths, np.array(labels, dtype=np.int64))


def _parsed(line: str, where: str) -> tuple[str, int]:
    """("images/test/1.jpg", 3); a path may have spaces in it."""
    path, _, label = line.strip().rpartition(" ")
    if not path or not label.isdecimal():
        raise ValueError(f'{where}: {printable(line.strip())!r}, expected "path label" with a whole number')
    return path.strip(), int(label)
