"""Labelled shards: samples in order, splits by shard or by share, and every mistake named."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from image_trees import EXPECTED, colour, encoded, labelled_shard, picture, pixel, shard

from snell_scale.data.batches import evaluation_batches
from snell_scale.data.images import BrokenImage
from snell_scale.data.labelled.webdataset import WebdatasetConfig
from snell_scale.interfaces import DataBundle


def build(root: Path, **options: Any) -> DataBundle:
    given = {"train": ["train-{0..1}.tar"], "validation": ["val.tar"], "test": ["test-*.tar"], **options}
    config = WebdatasetConfig.model_validate({"augmentation": "none", **given, "root": str(root)})
    return config.build(seed=0, preprocessing=EXPECTED)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    labelled_shard(tmp_path / "train-0.tar", [0, 1, 2])
    labelled_shard(tmp_path / "train-1.tar", [2, 1])
    labelled_shard(tmp_path / "val.tar", [1, 0])
    labelled_shard(tmp_path / "test-0.tar", [2, 2, 0])
    return tmp_path


def test_shards_become_splits_in_the_order_of_their_files(shards: Path) -> None:
    bundle = pickle.loads(pickle.dumps(build(shards)))
    assert bundle.sizes == {"train": 5, "validation": 2, "test": 3}
    assert bundle.class_names == ("0", "1", "2")
    for workers in (0, 2):
        batches = list(evaluation_batches(bundle.train, 2, num_workers=workers))
        assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 1, 2, 2, 1]
    assert pixel(bundle.train[4, 0]) == colour(1, 1)
    assert build(shards, classes=["ant", "bee", "cat"]).class_names == ("ant", "bee", "cat")


def test_shares_stand_in_for_missing_splits(tmp_path: Path) -> None:
    labelled_shard(tmp_path / "train-0.tar", [0, 1] * 10)
    options = {"train": ["train-0.tar"], "validation": [], "test": []}
    bundle = build(tmp_path, **options, validation_fraction=0.2, test_fraction=0.1)
    assert bundle.sizes == {"train": 14, "validation": 4, "test": 2}
    with pytest.raises(ValueError, match=r"has no test split.*data\.test_fraction"):
        build(tmp_path, **options, validation_fraction=0.2)


PNG = encoded(picture(0))
MISTAKES: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no class": ([("a.png", PNG)], r"test-0\.tar:a has png, expected one image .* and a cls"),
    "no image": ([("a.cls", b"0")], "a has cls, expected one image"),
    "two images": ([("a.png", PNG), ("a.jpg", PNG), ("a.cls", b"0")], "a has cls, jpg, png, expected one image"),
    "no number": ([("a.png", PNG), ("a.cls", b"cat")], r"test-0\.tar:a\.cls holds b'cat', expected the number"),
    "negative": ([("a.png", PNG), ("a.cls", b"-1")], "holds b'-1', expected the number"),
    "strange class": ([("a.png", PNG), ("a.cls", b"7")], r"a\.png has the class 7, expected 0 to 2"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_samples_that_are_wrong_are_named(shards: Path, case: str) -> None:
    members, message = MISTAKES[case]
    shard(shards / "test-0.tar", members)
    with pytest.raises(ValueError, match=message):
        build(shards)


def test_a_broken_image_is_named_or_left_out(shards: Path) -> None:
    shard(shards / "test-0.tar", [("a.png", b"cut"), ("a.cls", b"0"), ("b.png", PNG), ("b.cls", b"0")])
    bundle = build(shards)
    with pytest.raises(BrokenImage, match=r"test-0\.tar:a\.png is no image"):
        bundle.test[0, 0]
    left = build(shards, skip_broken=True)
    assert left.sizes["test"] == 1
    assert left.skipped[0].endswith("test-0.tar:a.png")


def test_shards_and_classes_that_are_wrong_are_named(shards: Path) -> None:
    with pytest.raises(ValueError, match="shards are named twice.*val.tar"):
        build(shards, test=["val.tar"])
    with pytest.raises(ValueError, match=r"has no shard absent-\*\.tar"):
        build(shards, test=["absent-*.tar"])
    with pytest.raises(ValueError, match=r"absent\.tar cannot be read"):
        build(shards, test=["absent.tar"])
    (shards / "test-0.tar").write_bytes(gzip.compress((shards / "val.tar").read_bytes()))
    with pytest.raises(ValueError, match=r"test-0\.tar is no whole, plain tar file"):
        build(shards)
    labelled_shard(shards / "test-0.tar", [0])
    labelled_shard(shards / "train-1.tar", [4])
    with pytest.raises(ValueError, match="no training image has the class 3; classes are numbered from 0"):
        build(shards)
    with pytest.raises(ValueError, match="no training image has the class dog"):
        build(shards, train=["train-0.tar"], classes=["ant", "bee", "cat", "dog"])
