"""Small image files and data sets in the published layouts, made by hand; an image's colour tells its class."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from snell_scale.interfaces import InputSpec, Preprocessing

SIZE = 8
EXPECTED = Preprocessing(image=InputSpec(3, SIZE, SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0))


def colour(label: int, number: int = 0) -> tuple[int, int, int]:
    """The colour of every image of that class; `number` tells the images of a class apart."""
    return (20 + 30 * label, 10 * number, 200)


def picture(label: int, number: int = 0, *, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.new("RGB", size, colour(label, number))


def write_picture(path: Path, label: int, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(label, number).save(path)
    return path


def pixel(sample: Mapping[str, object]) -> tuple[int, ...]:
    """The colour of a sample's top left pixel, with the normalisation of EXPECTED undone."""
    image = np.asarray(sample["image"])
    return tuple(int(value) for value in np.rint((image[:, 0, 0] * 0.5 + 0.5) * 255))


def vtab_task(root: Path, task: str = "patch_camelyon", *, num_classes: int = 2) -> Path:
    """<root>/<task> with 8 training, 4 validation and 6 test images, as the published archive lays them out."""
    folder = root / task
    folder.mkdir(parents=True)
    lines: dict[str, list[str]] = {}
    for name, count, where in (("train800", 8, "train"), ("val200", 4, "train"), ("test", 6, "test")):
        for index in range(count):
            path = f"images/{where}/{name}_{index:06d}.png"
            write_picture(folder / path, index % num_classes, index)
            lines.setdefault(name, []).append(f"{path} {index % num_classes}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    return folder


def fgvc_set(
    root: Path,
    folder: str = "cub",
    *,
    images: str = "images",
    ids: Sequence[int] = (9, 2, 30),
    with_val: bool = True,
) -> Path:
    """<root>/<folder> with 4 training, 2 validation and 2 test images of each class id."""
    counts = {"train": 4, "val": 2, "test": 2} if with_val else {"train": 4, "test": 2}
    for split, count in counts.items():
        listed = {}
        for number in range(count):
            for class_id in ids:
                path = f"{class_id:03d}.bird/{split}_{number}.png"
                write_picture(root / folder / images / path, sorted(ids).index(class_id), number)
                listed[path] = class_id
        (root / folder / f"{split}.json").write_text(json.dumps(listed))
    return root / folder


def class_folders(root: Path, *, classes: Sequence[str] = ("ant", "bee"), count: int = 5) -> Path:
    """<root>/<class>/0.png, 1.png, …"""
    for label, name in enumerate(classes):
        for number in range(count):
            write_picture(root / name / f"{number}.png", label, number)
    return root


def shard(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar file with these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def saved_table(root: Path, labels: Sequence[int]) -> Path:
    """One image per label, as `datasets` saves it."""
    import datasets

    images = [{"bytes": encoded(picture(label, index)), "path": None} for index, label in enumerate(labels)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "label": list(labels)}, features=features).save_to_disk(
        str(root)
    )
    return root


def contract_sample(name: str, root: Path) -> dict[str, object]:
    """Options of the registered data set of that name, after its files were made below `root`."""
    options: dict[str, object] = {"root": str(root), "image_size": SIZE}
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2}
    if name == "vtab":
        vtab_task(root)
        return {**options, "task": "patch_camelyon"}
    if name == "fgvc":
        fgvc_set(root)
        return {**options, "set": "cub"}
    if name == "image_folder":
        class_folders(root)
        return {**options, **shares}
    if name == "webdataset":
        labelled_shard(root / "all.tar", [0, 1] * 5)
        return {**options, **shares, "train": ["all.tar"]}
    assert name == "hf_dataset", name
    saved_table(root / "table", [0, 1] * 5)
    return {**options, **shares, "root": str(root / "table")}


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def labelled_shard(path: Path, labels: Sequence[int]) -> Path:
    """One image and one .cls for every label."""
    members = []
    for index, label in enumerate(labels):
        members += [(f"{index:04d}.png", encoded(picture(label, index))), (f"{index:04d}.cls", b"%d" % label)]
    return shard(path, members)
