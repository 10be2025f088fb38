"""DreamBooth: images of a subject, beside which images of its class keep what the model knew of that."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from snell_scale.data.dreambooth import DreamBoothConfig
from snell_scale.data.latents import WithPrior
from snell_scale.interfaces import InputSpec, Preprocessing
from tests.data.cached_latents import cached


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    for name, number in (("dog", 5), ("dogs", 7)):
        (tmp_path / name).mkdir()
        for index in range(number):
            pixels = rng.integers(0, 256, size=(12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path / "dog", tmp_path / "dogs"


def dreambooth(folders: tuple[Path, Path], **changes: Any) -> DreamBoothConfig:
    settings: dict[str, Any] = {
        "instance_folder": str(folders[0]),
        "instance_prompt": "a photo of sks dog",
        "class_folder": str(folders[1]),
        "class_prompt": "a photo of a dog",
        "num_class_images": 7,
        "prior_weight": 0.25,
        "image_size": 8,
    }
    return DreamBoothConfig(**(settings | changes))


def test_dreambooth_pairs_instances_with_images_of_the_class(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data = dreambooth(folders).build(seed=0)
    assert data.sizes == {"train": 3, "validation": 1, "test": 1}
    made = cached(tmp_path / "cache", data, shape=(3, 8, 8))
    train = made.train
    assert isinstance(train, WithPrior)
    batch = train.__getitems__([(index, epoch) for epoch in range(7) for index in range(3)])
    assert batch["latents"].shape == (21, 2, 3, 8, 8)
    assert batch["weight"][0].tolist() == [1.0, 0.25]
    texts = [[train.prompts.texts[number] for number in row] for row in batch["prompt"].tolist()]
    assert all(row == ["a photo of sks dog", "a photo of a dog"] for row in texts)
    taken = batch["index"][:, 1].bincount()
    assert taken.tolist() == [3] * 7  # every class image takes its turn
    assert not torch.equal(batch["noise"][:, 0], batch["noise"][:, 1])
    single = train[2, 4]
    assert all(torch.equal(value, batch[name][14]) for name, value in single.items())
    assert isinstance(pickle.loads(pickle.dumps(train)), WithPrior)


def test_dreambooth_images_are_centre_squares(folders: tuple[Path, Path]) -> None:
    data = dreambooth(folders, image_size=12, class_folder=None, class_prompt=None).build(seed=0)
    sample: Any = data.test
    order = np.random.default_rng(0).permutation(5)
    original = np.asarray(Image.open(folders[0] / f"{order[1]}.png"))[:, 2:14]
    expected = torch.from_numpy(original.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(sample[0, 0]["image"], expected, rtol=0, atol=1e-6)


def test_dreambooth_takes_the_models_size() -> None:
    spec = InputSpec(3, 512, 512, (0.5,) * 3, (0.5,) * 3)
    config = DreamBoothConfig(instance_folder="absent", instance_prompt="x")
    assert config._input_spec(Preprocessing(image=spec)).height == 512
    with pytest.raises(ValueError, match=r"data\.image_size"):
        config.build(seed=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_class_images": 8}, r"class_folder.*7 images, expected at least 8"),
        ({"validation_count": 4}, r"instance_folder.*5 images"),
        ({"instance_folder": "absent"}, r"instance_folder: there is no folder absent"),
        ({"class_folder": "absent"}, r"class_folder: there is no folder absent"),
        ({"class_prompt": None}, "belong together"),
        ({"class_prompt": "a photo of sks dog"}, "equals instance_prompt"),
    ],
)
def test_dreambooth_refuses_what_cannot_be(
    folders: tuple[Path, Path], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        dreambooth(folders, **changes).build(seed=0)


def test_a_broken_instance_image_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for file in folders[0].iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"\.png is damaged or truncated"):
        cached(tmp_path / "cache", dreambooth(folders).build(seed=0), shape=(3, 8, 8))
