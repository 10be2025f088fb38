"""A folder per class, with splits as folders or as shares, and every mistake named."""

from pathlib import Path
from typing import Any

import pytest
from image_trees import EXPECTED, class_folders, colour, pixel, write_picture

from snell_scale import registry
from snell_scale.config import resolve
from snell_scale.data.labelled.image_folder import ImageFolderConfig
from snell_scale.data.labelled.images import LabelledImages
from snell_scale.interfaces import DataBundle
from snell_scale.records import read_result
from snell_scale.run import run
from tests.conftest import TINY


def build(root: Path, **options: Any) -> DataBundle:
    config = ImageFolderConfig.model_validate({"augmentation": "none", **options, "root": str(root)})
    return config.build(seed=0, preprocessing=EXPECTED)


def with_splits(root: Path, *, validation: str = "val") -> Path:
    for split in ("train", validation, "test"):
        class_folders(root / split, count=3 if split == "train" else 2)
    return root


@pytest.mark.parametrize("validation", ["val", "validation", "valid"])
def test_folders_become_splits_and_sorted_classes(tmp_path: Path, validation: str) -> None:
    with_splits(tmp_path, validation=validation)
    bundle = build(tmp_path)
    assert bundle.sizes == {"train": 6, "validation": 4, "test": 4}
    assert bundle.class_names == ("ant", "bee")
    assert [int(bundle.train[index, 0]["label"]) for index in range(6)] == [0, 0, 0, 1, 1, 1]
    assert pixel(bundle.train[4, 0]) == colour(1, 1)


def test_shares_of_one_root_are_disjoint_and_hold_every_class(tmp_path: Path) -> None:
    class_folders(tmp_path, classes=("ant", "bee", "cat"), count=10)
    bundle = build(tmp_path, validation_fraction=0.2, test_fraction=0.3)
    assert bundle.sizes == {"train": 15, "validation": 6, "test": 9}
    entries = []
    for split, count in ((bundle.train, 5), (bundle.validation, 2), (bundle.test, 3)):
        assert isinstance(split, LabelledImages)
        assert [split.samples.labels.tolist().count(label) for label in range(3)] == [count] * 3
        entries += split.samples.entries
    assert len(entries) == len(set(entries)) == 30
    grown = class_folders(tmp_path, classes=("ant", "bee", "cat", "dog"), count=10)
    again = build(grown, validation_fraction=0.2, test_fraction=0.3)
    assert isinstance(again.test, LabelledImages)
    assert isinstance(bundle.test, LabelledImages)
    assert set(bundle.test.samples.entries) < set(again.test.samples.entries)  # another class changes no other


def test_images_at_any_depth_count_and_hidden_files_do_not(tmp_path: Path) -> None:
    with_splits(tmp_path)
    write_picture(tmp_path / "train/ant/more/deep.PNG", 0)
    write_picture(tmp_path / "train/ant/.hidden.png", 0)
    write_picture(tmp_path / "train/.cache/x.png", 0)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    assert build(tmp_path).sizes["train"] == 7


def test_links_to_images_are_followed_and_loops_are_named(tmp_path: Path) -> None:
    with_splits(tmp_path / "data")
    class_folders(tmp_path / "elsewhere", classes=("more",))
    (tmp_path / "data/train/bee/linked").symlink_to(tmp_path / "elsewhere/more")
    assert build(tmp_path / "data").sizes["train"] == 11
    (tmp_path / "data/train/bee/loop").symlink_to(tmp_path / "data/train/bee")
    with pytest.raises(ValueError, match="bee/loop is a link to a folder that it is in; remove the link"):
        build(tmp_path / "data")


def test_a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with_splits(tmp_path)
    (tmp_path / "train/bee/loop.png").symlink_to(tmp_path / "train/bee/loop.png")
    assert build(tmp_path).sizes["train"] == 7
    left = build(tmp_path, skip_broken=True)
    assert left.sizes["train"] == 6
    assert left.skipped == (str(tmp_path / "train/bee/loop.png"),)


def test_classes_that_are_empty_or_unknown_to_training_are_named(tmp_path: Path) -> None:
    with_splits(tmp_path)
    write_picture(tmp_path / "test/wasp/0.png", 0)
    with pytest.raises(ValueError, match=r"test has 1 classes that the training images have not: wasp"):
        build(tmp_path)
    (tmp_path / "train/wasp").mkdir()
    with pytest.raises(ValueError, match=r"train/wasp has no image \(\.bmp.*\.webp\); add some"):
        build(tmp_path)


def test_layouts_that_can_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, classes=("train", "tram"))
    with pytest.raises(ValueError, match="has a folder train and beside it tram: are these classes"):
        build(tmp_path, validation_fraction=0.2, test_fraction=0.2)
    with_splits(tmp_path / "double")
    class_folders(tmp_path / "double/validation")
    with pytest.raises(ValueError, match="val and .*validation are both there"):
        build(tmp_path / "double")


def test_data_sets_that_are_too_small_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has none, expected at least two folders of classes"):
        build(tmp_path)
    write_picture(tmp_path / "ant/0.png", 0)  # a data set of one image
    with pytest.raises(ValueError, match="has one, ant, expected at least two folders"):
        build(tmp_path, validation_fraction=0.2, test_fraction=0.2)
    class_folders(tmp_path, classes=("bee",), count=5)
    with pytest.raises(ValueError, match=r"class 'ant' has 1 image\(s\), too few to hold out"):
        build(tmp_path, validation_fraction=0.2, test_fraction=0.2)
    with pytest.raises(ValueError, match=r"has no test split; make one, or set data\.test_fraction"):
        build(tmp_path, validation_fraction=0.2)
    with pytest.raises(ValueError, match="leave nothing to train on"):
        build(tmp_path, validation_fraction=0.5, test_fraction=0.5)


def test_a_missing_validation_split_is_held_out_of_the_training_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        class_folders(tmp_path / split, count=10)
    assert build(tmp_path, validation_fraction=0.1).sizes == {"train": 18, "validation": 2, "test": 20}


def test_a_run_records_what_was_left_out(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", count=10)
    broken = tmp_path / "data" / "ant" / "broken.png"
    broken.write_text("no image")
    data = {"name": "image_folder", "root": str(tmp_path / "data"), "image_size": 8, "skip_broken": True}
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2}
    content = {**TINY, "data": {**data, **shares}, "output_dir": str(tmp_path / "runs")}
    content["training"] = {**TINY["training"], "steps": 1}
    run(resolve(content, [], config_class=registry.config_class, source="test"), quiet=True)
    assert list(read_result(tmp_path / "runs" / "tiny").skipped) == [str(broken)]
