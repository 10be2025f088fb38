"""What every registered data set must do: three deterministic splits of labelled images of the stated shape."""

from typing import Any

import pytest
import torch

from snell_scale.data.batches import evaluation_batches, num_samples
from snell_scale.interfaces import DataBundle
from snell_scale.registry import config_class, names

# One small config per registered data set; adding one to the registry means adding one here.
SAMPLES: dict[str, dict[str, Any]] = {
    "digits": {"classes": [3, 1, 7], "train_per_class": 6, "validation_per_class": 4, "shift_pixels": 1},
}


@pytest.fixture(params=names("data"))
def build(request: pytest.FixtureRequest) -> Any:
    config = config_class("data", request.param).model_validate({"name": request.param, **SAMPLES[request.param]})
    return config.build


def splits(bundle: DataBundle) -> dict[str, Any]:
    return {"train": bundle.train, "validation": bundle.validation, "test": bundle.test}


def test_splits_have_the_stated_sizes_and_valid_labels(build: Any) -> None:
    bundle = build(seed=0)
    spec = bundle.input_spec
    for name, split in splits(bundle).items():
        batches = list(evaluation_batches(split, 7))
        images = torch.cat([batch["image"] for batch in batches])
        labels = torch.cat([batch["label"] for batch in batches])
        assert images.shape == (bundle.sizes[name], spec.channels, spec.height, spec.width)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert set(labels.tolist()) == set(range(len(bundle.class_names)))
        assert images.isfinite().all()


def test_one_by_one_and_batched_look_up_agree(build: Any) -> None:
    split = build(seed=0).train
    keys = [(0, 0), (num_samples(split) - 1, 3), (1, 3)]
    batched = split.__getitems__(keys)
    for position, key in enumerate(keys):
        sample = split[key]
        assert sample["label"].ndim == 0
        assert all(torch.equal(sample[name], batched[name][position]) for name in batched)


def test_the_same_seed_gives_the_same_data(build: Any) -> None:
    for first, second in zip(splits(build(seed=1)).values(), splits(build(seed=1)).values(), strict=True):
        a, b = (next(evaluation_batches(split, num_samples(split))) for split in (first, second))
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])
