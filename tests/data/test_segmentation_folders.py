"""Segmentation folders: hand-made files in the published layouts read as published; what is wrong is named."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from snell_scale.data.batches import evaluation_batches, num_samples
from snell_scale.data.images import BrokenImage
from snell_scale.data.masked.files import Pair
from snell_scale.data.masked.folder import divided
from snell_scale.data.masked.layouts import Ade20kConfig, MaskPairsConfig
from snell_scale.interfaces import IGNORED_PIXEL, DataBundle, InputSpec, Preprocessing

PLAIN: dict[str, Any] = {"image_size": 16, "validation_fraction": 0.25, "evaluation_resize": "none"}
PAIRS: dict[str, Any] = {
    **PLAIN,
    "test_fraction": 0.25,
    "mask_values": {"road": [7], "sky": [20, 21]},
    "ignore_values": [0],
}


def write(path: Path, values: Any, *, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    (image.convert(mode) if mode else image).save(path)
    return path


def photograph(path: Path, *, height: int = 12, width: int = 10, value: int = 100) -> Path:
    return write(path, np.full((height, width, 3), value))


def pairs_at(root: Path, number: int = 8, *, mask_suffix: str = "") -> Path:
    """Masks with road in the upper half, sky (two values of it) below, and an ignored corner."""
    mask = np.full((12, 10), 7)
    mask[6:, :5], mask[6:, 5:], mask[0, 0] = 20, 21, 0
    for index in range(number):
        photograph(root / "images" / f"{index}.png", value=20 * index)
        write(root / "masks" / f"{index}{mask_suffix}.png", mask)
    return root


def pairs_config(root: Path, **settings: Any) -> MaskPairsConfig:
    return MaskPairsConfig.model_validate({"name": "mask_pairs", "root": str(root), **PAIRS, **settings})


def masks_of(bundle: DataBundle, split: str = "test") -> list[list[list[int]]]:
    data: Any = getattr(bundle, split)
    return [data[(index, 0)]["mask"].tolist() for index in range(num_samples(data))]


def all_masks_of(bundle: DataBundle) -> list[list[list[int]]]:
    return [mask for split in ("train", "validation", "test") for mask in masks_of(bundle, split)]


def ade20k(root: Path) -> Path:
    for part, number in (("training", 5), ("validation", 2)):
        for index in range(1, number + 1):
            name = f"ADE_{'train' if part == 'training' else 'val'}_{index:08d}"
            photograph(root / "images" / part / f"{name}.jpg")
            mask = np.full((12, 10), index)
            mask[0, :2] = (0, 150)
            write(root / "annotations" / part / f"{name}.png", mask)
    return root


def test_ade20k(tmp_path: Path) -> None:
    root = ade20k(tmp_path / "ADEChallengeData2016")
    for given in (root, tmp_path):
        bundle = Ade20kConfig.model_validate({"root": str(given), **PLAIN}).build(seed=0)
        assert bundle.sizes == {"train": 4, "validation": 1, "test": 2}
        assert len(bundle.class_names) == 150
        assert bundle.class_names[::149] == ("1", "150")
        second = masks_of(bundle)[1]  # 0 is ignored, every other value one less
        assert second[0][:3] == [IGNORED_PIXEL, 149, 1]
        assert second[11] == [1] * 10


def test_ade20k_class_names_are_the_first_synonyms(tmp_path: Path) -> None:
    root = ade20k(tmp_path)
    lines = [
        "Idx\tRatio\tTrain\tVal\tName",
        "1\t0.1576\t11664\t1172\twall",
        "2\t0.1\t6046\t612\tbuilding, edifice",
    ]
    lines += [f"{number} \t0.01\t10\t1\tthing {number} , other" for number in range(3, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    names = Ade20kConfig.model_validate({"root": str(root), **PLAIN}).build(seed=0).class_names
    assert names[:3] == ("wall", "building", "thing 3")
    lines[3:5] = [f"{number}\t0.01\t10\t1\t{names}" for number, names in ((3, "bar"), (4, "bar, rod"))]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    names = Ade20kConfig.model_validate({"root": str(root), **PLAIN}).build(seed=0).class_names
    assert names[1:5] == ("building", "bar", "bar, rod", "thing 5")  # two classes are never called alike
    (root / "objectInfo150.txt").write_text("\n".join(lines[:100]))
    with pytest.raises(ValueError, match="names 99 different classes, expected 150"):
        Ade20kConfig.model_validate({"root": str(root), **PLAIN}).build(seed=0)


def test_kvasir_masks_are_split_at_128(tmp_path: Path) -> None:
    for index in range(6):
        photograph(tmp_path / "images" / f"cju{index}.jpg")
        values = np.zeros((12, 10, 3))
        values[:6], values[0, 0], values[11, 9] = 255, 130, 120
        write(tmp_path / "masks" / f"cju{index}.png", values)
    (tmp_path / "kavsir_bboxes.json").write_text("{}")
    config = {"root": str(tmp_path), **PLAIN, "layout": "kvasir", "test_fraction": 0.2}
    bundle = MaskPairsConfig.model_validate(config).build(seed=0)
    assert bundle.class_names == ("background", "polyp")
    assert masks_of(bundle) == [[[1] * 10] * 6 + [[0] * 10] * 6]


def test_kvasir_masks_as_jpeg(tmp_path: Path) -> None:
    """A JPEG of a mask has values around 0 and 255, and its three channels need not be quite equal."""
    values = np.zeros((32, 32, 3))
    values[:16] = (255, 250, 255)
    for index in range(3):
        photograph(tmp_path / "images" / f"{index}.jpg", height=32, width=32)
        write(tmp_path / "masks" / f"{index}.jpg", values)
    config = {"root": str(tmp_path), **PLAIN, "layout": "kvasir", "test_fraction": 0.2}
    assert masks_of(MaskPairsConfig.model_validate(config).build(seed=0)) == [[[1] * 32] * 16 + [[0] * 32] * 16]


def test_polyp_benchmark(tmp_path: Path) -> None:
    for index in range(4):
        photograph(tmp_path / "TrainDataset" / "image" / f"{index}.png")
        write(tmp_path / "TrainDataset" / "mask" / f"{index}.png", np.full((12, 10), 255))
    for name, number in (("CVC-300", 1), ("Kvasir", 2)):
        for index in range(number):
            photograph(tmp_path / "TestDataset" / name / "images" / f"{index}.png")
            write(tmp_path / "TestDataset" / name / "masks" / f"{index}.png", np.full((12, 10), 255))
    config = {"root": str(tmp_path), **PLAIN, "layout": "polyp"}
    build = MaskPairsConfig.model_validate
    assert build(config).build(seed=0).sizes == {"train": 3, "validation": 1, "test": 3}
    assert build({**config, "test_sets": ["Kvasir"]}).build(seed=0).sizes["test"] == 2
    with pytest.raises(ValueError, match=r"'ETIS'; .* has: CVC-300, Kvasir"):
        build({**config, "test_sets": ["ETIS"]}).build(seed=0)


def test_pairs_with_values_suffix_and_test_folder(tmp_path: Path) -> None:
    pairs_at(tmp_path, 4, mask_suffix="_mask")
    pairs_at(tmp_path / "held out", 2, mask_suffix="_mask")
    settings = {
        "mask_suffix": "_mask",
        "test_fraction": None,
        "test_images": "held out/images",
        "test_masks": "held out/masks",
    }
    bundle = pairs_config(tmp_path, **settings).build(seed=0)
    assert bundle.class_names == ("road", "sky")
    assert bundle.sizes == {"train": 3, "validation": 1, "test": 2}
    expected = [[0] * 10 for _ in range(6)] + [[1] * 10] * 6
    expected[0][0] = IGNORED_PIXEL
    assert masks_of(bundle) == [expected] * 2


def test_palette_masks_are_read_as_indexes(tmp_path: Path) -> None:
    pairs_at(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        image = Image.open(path)
        image.load()
        palette = Image.fromarray(np.asarray(image), mode="P")
        palette.putpalette([value for index in range(256) for value in (255 - index, 3, index)])
        palette.save(path)
        assert Image.open(path).mode == "P"
    assert masks_of(pairs_config(tmp_path).build(seed=0))[0][11] == [1] * 10


def test_colour_masks(tmp_path: Path) -> None:
    colours = np.zeros((12, 10, 3))
    colours[:6], colours[6:] = (128, 64, 128), (70, 130, 180)
    for index in range(4):
        photograph(tmp_path / "images" / f"{index}.jpg")
        write(tmp_path / "masks" / f"{index}.png", colours)
    given = {"mask_values": {}, "mask_colours": {"road": ["#804080"], "sky": ["#4682B4"]}, "ignore_values": []}
    assert masks_of(pairs_config(tmp_path, **given).build(seed=0)) == [[[0] * 10] * 6 + [[1] * 10] * 6]
    ignoring = {**given, "mask_colours": {"road": ["#804080"]}, "ignore_values": ["#4682b4"]}
    assert masks_of(pairs_config(tmp_path, **ignoring).build(seed=0))[0][11] == [IGNORED_PIXEL] * 10
    unknown = {**given, "mask_colours": {"road": ["#804080"]}}
    with pytest.raises(BrokenImage, match=r"\.png has the value\(s\) #4682b4, .* expected #804080"):
        masks_of(pairs_config(tmp_path, **unknown).build(seed=0))
    with pytest.raises(BrokenImage, match="is a mask in colours"):
        masks_of(pairs_config(tmp_path).build(seed=0))


def test_splits_are_disjoint_and_chosen_by_the_seed() -> None:
    pairs = [Pair(Path(f"{index}.jpg"), Path(f"{index}.png")) for index in range(20)]
    parts = divided(pairs, [0.2, 0.3], seed=0)
    assert [len(part) for part in parts] == [10, 4, 6]
    assert sorted((pair for part in parts for pair in part), key=str) == sorted(pairs, key=str)
    assert divided(pairs, [0.2, 0.3], seed=0) == parts
    assert divided(pairs, [0.2, 0.3], seed=1) != parts
    with pytest.raises(ValueError, match=r"1 image\(s\) cannot be divided"):
        divided(pairs[:1], [0.2], seed=0)


def test_a_batch_of_different_sizes_is_padded(tmp_path: Path) -> None:
    pairs_at(tmp_path, 8)
    for index in range(8):
        photograph(tmp_path / "images" / f"{index}.png", height=12 + index, width=10)
        write(tmp_path / "masks" / f"{index}.png", np.full((12 + index, 10), 7))
    bundle = pairs_config(tmp_path, validation_fraction=0.5).build(seed=0)
    batch = next(evaluation_batches(bundle.validation, 4))
    heights = batch["image_size"][:, 0].tolist()
    assert heights == batch["mask_size"][:, 0].tolist() == sorted(set(heights))
    assert batch["image"].shape == (4, 3, max(heights), 10)
    for sample, height in enumerate(heights):
        assert (batch["mask"][sample, :height] == 0).all()
        assert (batch["mask"][sample, height:] == IGNORED_PIXEL).all()
        assert (batch["image"][sample, :, height:] == 0).all()


def test_training_samples_survive_pickling_and_are_a_function_of_index_and_epoch(tmp_path: Path) -> None:
    train: Any = pairs_config(pairs_at(tmp_path), photometric=True).build(seed=0).train
    copy = pickle.loads(pickle.dumps(train))
    assert torch.equal(train[(1, 2)]["image"], copy[(1, 2)]["image"])
    batch = train.__getitems__([(0, 0), (1, 2)])
    assert torch.equal(batch["image"][1], train[(1, 2)]["image"])
    assert batch["image"].shape == (2, 3, 16, 16)


def test_the_models_preprocessing_is_used_unless_a_size_is_given(tmp_path: Path) -> None:
    pairs_at(tmp_path)
    known = Preprocessing(InputSpec(1, 24, 32, (0.5,), (0.25,), interpolation="bicubic"))
    bundle = pairs_config(tmp_path, image_size=None).build(seed=0, preprocessing=known)
    assert bundle.input_spec == known.image
    assert bundle.train[(0, 0)]["image"].shape == (1, 24, 32)
    assert pairs_config(tmp_path).build(seed=0, preprocessing=known).input_spec.height == 16
    with pytest.raises(ValueError, match="image_size is not set"):
        pairs_config(tmp_path, image_size=None).build(seed=0)
