"""What every data set of labelled images on disk does alike: three disjoint, complete, repeatable splits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from image_trees import SIZE, contract_sample

from snell_scale.data.batches import evaluation_batches, num_samples
from snell_scale.data.labelled.images import LabelledImagesConfig
from snell_scale.interfaces import DataBundle
from snell_scale.registry import config_class, names

ON_DISK = [name for name in names("data") if issubclass(config_class("data", name), LabelledImagesConfig)]


@pytest.fixture(params=ON_DISK)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    options = {"name": request.param, **contract_sample(request.param, tmp_path)}
    return config_class("data", request.param).model_validate(options)


def whole(bundle: DataBundle) -> dict[str, dict[str, torch.Tensor]]:
    splits = {"train": bundle.train, "validation": bundle.validation, "test": bundle.test}
    return {name: next(evaluation_batches(split, num_samples(split))) for name, split in splits.items()}


def test_splits_are_complete_disjoint_and_as_described(config: Any) -> None:
    bundle = config.build(seed=0)
    spec = bundle.input_spec
    for name, batch in whole(bundle).items():
        assert set(batch) == bundle.fields == {"image", "label", "index"}
        assert batch["image"].shape == (bundle.sizes[name], spec.channels, SIZE, SIZE)
        assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
        assert set(batch["label"].tolist()) == set(range(len(bundle.class_names)))
        assert batch["index"].tolist() == list(range(bundle.sizes[name]))
    entries = [repr(e) for split in (bundle.train, bundle.validation, bundle.test) for e in split.samples.entries]
    assert len(entries) == len(set(entries)) == sum(bundle.sizes.values())
    assert config.describe().startswith(f"{config.name}/")


def test_the_same_seed_gives_the_same_images_and_another_epoch_others(config: Any) -> None:
    first, second = (whole(config.build(seed=3)) for _ in range(2))
    assert all(torch.equal(first[name]["image"], second[name]["image"]) for name in first)
    augmented = config.model_copy(update={"augmentation": "crop-flip", "rand_augment": 9, "color_jitter": 0.4})
    bundle = augmented.build(seed=3)
    views = [torch.stack([bundle.train[index, epoch]["image"] for index in range(4)]) for epoch in (0, 1, 0)]
    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], views[1])
    assert torch.equal(bundle.test[0, 0]["image"], bundle.test[0, 1]["image"])


def test_a_size_must_come_from_somewhere(config: Any) -> None:
    with pytest.raises(ValueError, match=r"set data\.image_size"):
        config.model_copy(update={"image_size": None}).build(seed=0)


def test_a_root_that_is_no_folder_is_named(config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root, what in ((tmp_path / "absent", "does not exist"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=rf"data\.root=.* {what} .*folder of the data set"):
            config.model_copy(update={"root": str(root)}).build(seed=0)
