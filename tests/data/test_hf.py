"""Data sets as `datasets` saves them: columns, splits, class names, and every mistake named."""

import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from image_trees import EXPECTED, colour, encoded, picture, pixel, write_picture

from snell_scale.data.batches import evaluation_batches
from snell_scale.data.images import BrokenImage
from snell_scale.data.labelled.hf import HfDatasetConfig
from snell_scale.interfaces import DataBundle


def build(root: Path, **options: Any) -> DataBundle:
    config = HfDatasetConfig.model_validate({"augmentation": "none", **options, "root": str(root)})
    return config.build(seed=0, preprocessing=EXPECTED)


def save(splits: dict[str, Any], root: Path) -> None:
    saved: Any = datasets.DatasetDict
    saved(splits).save_to_disk(str(root))


def table(
    labels: list[Any], *, names: list[str] | None = None, column: str = "image", feature: Any = None
) -> Any:
    """A data set of one image per label; `names` make the column a ClassLabel."""
    images = [{"bytes": encoded(picture(index % 3, index)), "path": None} for index in range(len(labels))]
    kind = datasets.ClassLabel(names=names) if names else feature or datasets.Value("int64")
    features = datasets.Features({column: datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict({column: images, "label": labels}, features=features)


def test_saved_splits_are_read_with_the_names_of_their_classes(tmp_path: Path) -> None:
    names = ["cat", "ant", "bee"]
    splits = {"train": [0, 1, 2, 0], "validation": [1], "test": [2, 0]}
    save({name: table(labels, names=names) for name, labels in splits.items()}, tmp_path)
    bundle = pickle.loads(pickle.dumps(build(tmp_path)))
    assert bundle.sizes == {"train": 4, "validation": 1, "test": 2}
    assert bundle.class_names == ("cat", "ant", "bee")
    for workers in (0, 1):
        batches = list(evaluation_batches(bundle.train, 3, num_workers=workers))
        assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 1, 2, 0]
    assert pixel(bundle.train[3, 0]) == colour(0, 3)


def test_one_table_is_split_by_shares_and_numbers_are_remapped(tmp_path: Path) -> None:
    table([30, 7] * 5).save_to_disk(str(tmp_path))
    bundle = build(tmp_path, validation_fraction=0.2, test_fraction=0.2)
    assert bundle.sizes == {"train": 6, "validation": 2, "test": 2}
    assert bundle.class_names == ("7", "30")
    with pytest.raises(ValueError, match=r"has no test split.*data\.test_fraction"):
        build(tmp_path, validation_fraction=0.2)


def test_other_columns_splits_text_labels_and_paths_can_be_named(tmp_path: Path) -> None:
    paths = [str(write_picture(tmp_path / f"{index}.png", 0, index)) for index in range(4)]
    content = {"file": paths, "species": ["owl", "emu"] * 2}
    splits = {name: datasets.Dataset.from_dict(content) for name in ("fit", "dev", "final")}
    save(splits, tmp_path / "set")
    bundle = build(
        tmp_path / "set", image_column="file", label_column="species", train_split="fit", validation_split="dev",
        test_split="final",
    )  # fmt: skip
    assert bundle.class_names == ("emu", "owl")
    assert pixel(bundle.test[1, 0]) == colour(0, 1)
    Path(paths[1]).unlink()
    with pytest.raises(BrokenImage, match=r"set \(test\), row 1 does not exist"):
        bundle.test[1, 0]
    assert bundle.skipped == ()


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install snell-scale\[data\]"):
        build(tmp_path)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not what datasets' save_to_disk writes"):
        build(tmp_path)
    root = tmp_path / "set"
    table([0, 1] * 5).save_to_disk(str(root))
    with pytest.raises(ValueError, match=r"data\.image_column is 'picture', but .* has the columns image, label"):
        build(root, image_column="picture")
    splits = {"train": table([0, 1]), "test": table([0, 5])}
    save(splits, tmp_path / "strange")
    with pytest.raises(ValueError, match=r"strange \(test\), row 1: the label is 5, which is no class"):
        build(tmp_path / "strange", validation_fraction=0.5)
    with pytest.raises(ValueError, match=r"data\.train_split is 'fit', but .* has the splits train, test"):
        build(tmp_path / "strange", train_split="fit")
    with pytest.raises(ValueError, match="name three different ones"):
        build(tmp_path / "strange", validation_split="test")
    table([0.5, 1.0], feature=datasets.Value("float32")).save_to_disk(str(tmp_path / "floats"))
    with pytest.raises(ValueError, match="expected whole numbers or names"):
        build(tmp_path / "floats", validation_fraction=0.2, test_fraction=0.2)
    table([0, -1], names=["a", "b"]).save_to_disk(str(tmp_path / "unlabelled"))
    with pytest.raises(ValueError, match="row 1: the label is -1"):
        build(tmp_path / "unlabelled", validation_fraction=0.2, test_fraction=0.2)
    nothing = datasets.Dataset.from_dict(
        {"image": [None] * 10, "label": [0, 1] * 5},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    nothing.save_to_disk(str(tmp_path / "nothing"))
    with pytest.raises(BrokenImage, match="holds no image but NoneType"):
        build(tmp_path / "nothing", validation_fraction=0.2, test_fraction=0.2).train[0, 0]
