"""Segmentation folders with something wrong in them: refused or left out, with the file named."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snell_scale.data.images import BrokenImage
from snell_scale.data.masked.files import find_pairs
from snell_scale.data.masked.layouts import MaskPairsConfig
from tests.data.test_segmentation_folders import (
    PLAIN,
    all_masks_of,
    masks_of,
    pairs_at,
    pairs_config,
    photograph,
    write,
)


def test_unpaired_files_are_listed(tmp_path: Path) -> None:
    pairs_at(tmp_path)
    (tmp_path / "masks" / "2.png").unlink()
    photograph(tmp_path / "masks" / "left.png")
    with pytest.raises(ValueError, match=r"1 without a mask in .*masks: 2; 1 without an image in .*images: left"):
        pairs_config(tmp_path).build(seed=0)
    photograph(tmp_path / "images" / "3.jpg")
    with pytest.raises(ValueError, match=r"3\.png and 3\.jpg have one name"):
        pairs_config(tmp_path).build(seed=0)


def test_absent_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder .*images"):
        pairs_config(tmp_path).build(seed=0)
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="images holds no image files"):
        pairs_config(tmp_path).build(seed=0)
    with pytest.raises(ValueError, match="there is no folder .*TestDataset"):
        MaskPairsConfig.model_validate({"root": str(tmp_path), **PLAIN, "layout": "polyp"}).build(seed=0)


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    pairs_at(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        write(path, np.full((12, 11), 7))
    with pytest.raises(BrokenImage, match=r"masks/\d\.png is 11x12 pixels, but its image .*images/\d\.png 10x12"):
        masks_of(pairs_config(tmp_path).build(seed=0))


def test_a_value_that_is_no_class_is_named(tmp_path: Path) -> None:
    config = pairs_config(pairs_at(tmp_path), mask_values={"road": [7], "sky": [20]})
    with pytest.raises(BrokenImage, match=r"\.png has the value\(s\) 21, .* expected 0, 7, 20;"):
        masks_of(config.build(seed=0))
    binary = pairs_config(tmp_path, mask_values={}, ignore_values=[], threshold=128)
    for path in (tmp_path / "masks").iterdir():
        write(path, np.eye(12, 10))
    with pytest.raises(BrokenImage, match="has the values 0 and 1 only.*data.threshold=1"):
        masks_of(binary.build(seed=0))
    as_told = pairs_config(tmp_path, mask_values={}, ignore_values=[], threshold=1, evaluation_masks="original")
    assert masks_of(as_told.build(seed=0))[0] == np.eye(12, 10).tolist()


def test_test_images_within_the_training_folder_are_refused(tmp_path: Path) -> None:
    pairs_at(tmp_path)
    for folder in ("images", "masks"):
        (tmp_path / folder / "test").mkdir()
        (tmp_path / folder / "0.png").rename(tmp_path / folder / "test" / "0.png")
    settings = {"test_fraction": None, "test_images": "images/test", "test_masks": "masks/test"}
    with pytest.raises(
        ValueError, match=r"0\.png is in the (train|validation) split and in the test split; keep"
    ):
        pairs_config(tmp_path, **settings).build(seed=0)


def test_broken_files_are_named_or_left_out_with_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs_at(tmp_path)
    image, mask = tmp_path / "images" / "1.png", tmp_path / "masks" / "5.png"
    write(image, np.random.default_rng(0).integers(0, 256, (12, 10, 3)))
    image.write_bytes(image.read_bytes()[:200])
    write(mask, np.full((5, 5), 7))
    with pytest.raises(BrokenImage, match=r"(1|5)\.png .*; or set data\.skip_broken=true"):
        all_masks_of(pairs_config(tmp_path).build(seed=0))
    bundle = pairs_config(tmp_path, skip_broken=True).build(seed=0)
    assert sum(bundle.sizes.values()) == 6
    assert len(bundle.skipped) == 2
    for path in (image, mask):
        assert any(str(path) in line for line in bundle.skipped)
    assert "2 of 8 images cannot be used and are left out" in capsys.readouterr().err


def test_names_that_are_no_utf8_and_links_that_loop(tmp_path: Path) -> None:
    pairs_at(tmp_path, 3)
    strange = os.fsdecode(b"caf\xe9")
    photograph(tmp_path / "images" / "sub" / f"{strange}.png")
    write(tmp_path / "masks" / "sub" / f"{strange}.png", np.full((12, 10), 99))
    (tmp_path / "images" / "sub" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "images" / ".hidden.png").write_text("no image")
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert [pair.image.name for pair in pairs] == ["0.png", "1.png", "2.png", f"{strange}.png"]
    with pytest.raises(BrokenImage, match=r"caf\\xe9\.png has the value\(s\) 99"):
        all_masks_of(pairs_config(tmp_path).build(seed=0))
    itself = tmp_path / "images" / "loop.png"
    itself.symlink_to(itself)
    write(tmp_path / "masks" / "loop.png", np.full((12, 10), 7))
    assert pairs_config(tmp_path, skip_broken=True).build(seed=0).skipped[0].startswith(str(itself))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 3}, "exactly one of mask_values, mask_colours and threshold"),
        ({"test_images": "test"}, "both test_images and test_masks"),
        ({"test_fraction": None}, "exactly one of test_fraction and test_images"),
        ({"test_sets": ["Kvasir"]}, "test_sets is for layout=polyp"),
        ({"layout": "kvasir"}, "is for layout=pairs; kvasir has its own"),
        ({"ignore_values": [7]}, "the mask value 7 is given twice"),
        ({"ignore_values": ["#ffffff"]}, "expected whole numbers"),
        ({"mask_values": {}, "mask_colours": {"a": ["red"]}}, "'red' is no colour"),
        ({"resize_range": [2.0, 0.5]}, "smallest, largest"),
    ],
)
def test_mistakes_in_the_config_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_config(Path("anywhere"), **settings)
