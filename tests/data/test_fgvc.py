"""The five FGVC sets in their published layout, the published augmentation, and every mistake named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_trees import EXPECTED, colour, fgvc_set, pixel
from PIL import Image

from snell_scale.data.labelled.fgvc import FgvcConfig
from snell_scale.data.labelled.images import LabelledImages
from snell_scale.interfaces import DataBundle, InputSpec, Preprocessing


def build(root: Path, *, seed: int = 0, **options: Any) -> DataBundle:
    config = FgvcConfig.model_validate({"set": "cub", **options, "root": str(root)})
    return config.build(seed=seed, preprocessing=EXPECTED)


@pytest.mark.parametrize(
    ("name", "folder", "images"),
    [
        ("cub", "CUB_200_2011", "images"),
        ("nabirds", "nabirds", "images"),
        ("flowers", "oxfordflower", ""),
        ("dogs", "Stanford-dogs", "Images"),
        ("cars", "cars", ""),
    ],
)
def test_lists_become_splits_with_class_ids_in_sorted_order(
    tmp_path: Path, name: str, folder: str, images: str
) -> None:
    fgvc_set(tmp_path, folder, images=images, ids=(9, 2, 30))
    bundle = build(tmp_path, set=name)
    assert bundle.sizes == {"train": 12, "validation": 6, "test": 6}
    assert bundle.class_names == ("2", "9", "30")  # by size, not as text
    labels = [int(bundle.train[index, 0]["label"]) for index in range(3)]
    assert labels == [1, 0, 2]
    for index, label in enumerate(labels):
        assert pixel(bundle.test[index, 0]) == colour(label)
    assert FgvcConfig.model_validate({"set": name, "root": "x"}).describe() == f"fgvc/{name}"


def test_without_val_json_a_stated_share_of_every_class_validates(tmp_path: Path) -> None:
    fgvc_set(tmp_path, with_val=False)
    with pytest.raises(ValueError, match=r"has no validation split; make one, or set data\.validation_fraction"):
        build(tmp_path)
    bundle = build(tmp_path, validation_fraction=0.25)
    assert bundle.sizes == {"train": 9, "validation": 3, "test": 6}
    labels = [int(bundle.validation[index, 0]["label"]) for index in range(3)]
    assert sorted(labels) == [0, 1, 2]

    def held_out(seed: int) -> list[str]:
        validation = build(tmp_path, validation_fraction=0.25, seed=seed).validation
        assert isinstance(validation, LabelledImages)
        return list(validation.samples.entries)

    assert held_out(0) == held_out(0)
    assert any(held_out(0) != held_out(seed) for seed in (1, 2, 3))


def test_training_images_are_cropped_and_mirrored_as_a_function_of_seed_index_and_epoch(tmp_path: Path) -> None:
    folder = fgvc_set(tmp_path)
    noise = np.random.default_rng(0).integers(0, 128, (48, 64, 3))
    brighter_to_the_right = noise + np.linspace(0, 127, 64).astype(int)[:, None]
    Image.fromarray(brighter_to_the_right.astype(np.uint8)).save(folder / "images/009.bird/train_0.png")
    before = torch.get_rng_state()
    bundle = build(tmp_path)
    views = [bundle.train[0, epoch]["image"] for epoch in range(40)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({view.numpy().tobytes() for view in views}) == 40
    assert all(torch.equal(build(tmp_path).train[0, epoch]["image"], views[epoch]) for epoch in (0, 7))
    assert not torch.equal(build(tmp_path, seed=1).train[0, 0]["image"], views[0])
    mirrored = sum(bool(view[..., :4].mean() > view[..., 4:].mean()) for view in views)
    assert 8 <= mirrored <= 32  # half of 40, and four standard deviations
    assert torch.equal(bundle.test[0, 0]["image"], bundle.test[0, 5]["image"])
    jittered = build(tmp_path, rand_augment=9, color_jitter=0.4).train[0, 0]["image"]
    assert not torch.equal(jittered, views[0])


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    folder = fgvc_set(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (100, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images/009.bird/test_0.png")
    spec = InputSpec(3, 27, 27, (0.0,) * 3, (1.0,) * 3, "bicubic", 0.9)
    config = FgvcConfig(root=str(tmp_path), set="cub")
    image = config.build(seed=0, preprocessing=Preprocessing(image=spec)).test[0, 0]["image"]
    whole = Image.fromarray(noise).resize((30, 50), Image.Resampling.BICUBIC)  # 27 / 0.9
    top, left = round((50 - 27) / 2), round((30 - 27) / 2)  # as torchvision rounds
    expected = np.asarray(whole)[top : top + 27, left : left + 27] / 255
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    own = FgvcConfig(root=str(tmp_path), set="cub", crop_fraction=1.0, interpolation="nearest").input_spec(
        EXPECTED
    )
    assert (own.crop_fraction, own.interpolation) == (1.0, "nearest")


MISTAKES: dict[str, tuple[Any, str]] = {
    "not a list": ([1], r"test\.json holds no list of images"),
    "empty": ({}, r"test\.json holds no list of images"),
    "class of another kind": ({"a.png": 1.5}, r"test\.json: a\.png has the class 1\.5"),
    "class true": ({"a.png": True}, "has the class True"),
    "strange class": (
        {"009.bird/test_0.png": 77},
        r"test\.json has 1 images of classes that train\.json has not: 009\.bird/test_0\.png \(class 77\)",
    ),
    "absent": ({"nowhere/a.png": 9}, r"test\.json lists 1 of 1 images that are not in .*images: nowhere/a\.png"),
    "outside": ({"../../a.png": 9}, r"test\.json: \.\./\.\./a\.png leads out of the data set"),
    "twice": ({"009.bird/train_0.png": 9}, "in the train split and in the test split: 009.bird/train_0.png"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_every_mistake_in_a_list_is_named(tmp_path: Path, case: str) -> None:
    folder = fgvc_set(tmp_path)
    content, message = MISTAKES[case]
    (folder / "test.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder of cub; expected one of cub, CUB_200_2011"):
        build(tmp_path)
    folder = fgvc_set(tmp_path)
    (folder / "test.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"test\.json is no JSON"):
        build(tmp_path)
    (folder / "test.json").unlink()
    with pytest.raises(ValueError, match=r"there is no .*test\.json"):
        build(tmp_path)
    (folder / "train.json").write_text(json.dumps({"a.png": 1, "b.png": "two"}))
    (folder / "test.json").write_text(json.dumps({"a.png": 1}))
    with pytest.raises(ValueError, match="classes that are numbers and classes that are text"):
        build(tmp_path)
    with pytest.raises(ValueError, match="Input should be 'cub'"):
        FgvcConfig.model_validate({"set": "birds", "root": "x"})


def test_an_image_of_another_shape_than_a_square_model_takes_is_refused(tmp_path: Path) -> None:
    fgvc_set(tmp_path)
    wide = Preprocessing(image=InputSpec(3, 8, 16, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match=r"8x16 images.*data\.resize=squash"):
        FgvcConfig(root=str(tmp_path), set="cub").build(seed=0, preprocessing=wide)
    bundle = FgvcConfig(root=str(tmp_path), set="cub", resize="squash").build(seed=0, preprocessing=wide)
    assert bundle.test[0, 0]["image"].shape == (3, 8, 16)
    odd = Preprocessing(image=InputSpec(3, 8, 8, (0.5,) * 3, (0.5,) * 3, "random"))
    with pytest.raises(ValueError, match=r"interpolation is 'random'.*set data\.interpolation"):
        FgvcConfig(root=str(tmp_path), set="cub").build(seed=0, preprocessing=odd)
