"""What every registered data set must do: three deterministic, disjoint splits of samples that are as it says."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from snell_scale.data.batches import evaluation_batches, num_samples, training_batches
from snell_scale.interfaces import IGNORED_PIXEL, Batch, DataBundle, Preprocessing
from snell_scale.registry import config_class, names
from tests.data.image_trees import contract_sample, write_picture
from tests.data.pair_files import ten_pairs

_LISTED = ("vtab", "fgvc")  # files say which image is in which split
SPLITS = ("train", "validation", "test")
_SHARES = {"validation_fraction": 0.2, "test_fraction": 0.2}


def _masked_pictures(images: Path, masks: Path, count: int, *, first: int = 0, suffix: str = ".png") -> None:
    masks.mkdir(parents=True)
    for index in range(first, first + count):
        write_picture(images / f"{index}{suffix}", index % 3, index)
        Image.fromarray(np.full((10, 12), 1 + index % 2, dtype=np.uint8)).save(masks / f"{index}.png")


def _ade20k(root: Path) -> dict[str, Any]:
    for part, first, count in (("training", 0, 8), ("validation", 20, 3)):
        folders = (root / "images" / part, root / "annotations" / part)
        _masked_pictures(*folders, count, first=first, suffix=".jpg")
    return {"root": str(root), "image_size": 8, "validation_fraction": 0.25}


def _mask_pairs(root: Path) -> dict[str, Any]:
    _masked_pictures(root / "images", root / "masks", 10)
    return {"root": str(root), "image_size": 8, **_SHARES, "mask_values": {"one": [1], "two": [2]}}


def _dreambooth(root: Path) -> dict[str, Any]:
    for index in range(6):
        write_picture(root / "dog" / f"{index}.png", index, index)
    return {"instance_folder": str(root / "dog"), "instance_prompt": "a photo of sks dog", "image_size": 8}


def _from_tree(name: str) -> Callable[[Path], dict[str, Any]]:
    return lambda root: contract_sample(name, root)


_DIGITS = {"classes": [3, 1, 7], "train_per_class": 6, "validation_per_class": 4, "shift_pixels": 1}
_SCENES = {"image_size": 32, "train_scenes": 9, "validation_scenes": 5, "test_scenes": 4}

# Per registered data set: makes its files below a folder and gives its settings. A new registry line needs one.
SAMPLES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "digits": lambda root: {**_DIGITS, "captions": ["a {}", "the {}"]},
    "shapes": lambda root: _SCENES,
    "digit_scenes": lambda root: {**_SCENES, "classes": [3, 1, 7]},
    "ade20k": _ade20k,
    "mask_pairs": _mask_pairs,
    "image_text": lambda root: {"format": "csv", "source": str(ten_pairs(root)), "image_size": 8, **_SHARES},
    "dreambooth": _dreambooth,
    **{name: _from_tree(name) for name in ("vtab", "fgvc", "image_folder", "webdataset", "hf_dataset")},
}


def tokenize(captions: Sequence[str]) -> Tensor:
    return torch.tensor([[len(caption), 1] for caption in captions])


@pytest.fixture(params=names("data"))
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    settings = SAMPLES[request.param](tmp_path)
    config = config_class("data", request.param).model_validate({"name": request.param, **settings})
    assert config.describe()

    def made(*, seed: int) -> DataBundle:
        return config.build(seed=seed, preprocessing=Preprocessing(tokenize=tokenize))

    return made


def splits(bundle: DataBundle) -> dict[str, Any]:
    return {name: getattr(bundle, name) for name in SPLITS}


def whole(split: Any) -> Batch:
    """All samples of a split, stacked."""
    batches = list(evaluation_batches(split, 7))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_samples_have_the_stated_entries_and_shapes(build: Any) -> None:
    bundle = build(seed=0)
    spec = bundle.input_spec
    for name, split in splits(bundle).items():
        samples = whole(split)
        assert bundle.fields <= samples.keys()
        images = samples["image"]
        assert images.shape[:2] == (bundle.sizes[name], spec.channels)
        # Images with masks are evaluated whole; the size is that of a training crop and of a sliding window.
        if name == "train" or "mask" not in bundle.fields:
            assert images.shape[2:] == (spec.height, spec.width)
        assert images.dtype == torch.float32
        assert images.isfinite().all()
        for key, limit in (("label", len(bundle.class_names)), ("caption", len(bundle.captions))):
            if key in bundle.fields:
                assert samples[key].dtype == torch.int64
                assert 0 <= int(samples[key].min()) <= int(samples[key].max()) < limit
        if "text" in bundle.fields:
            assert torch.equal(
                samples["text"], tokenize([bundle.captions[i] for i in samples["caption"].tolist()])
            )
        if "mask" in bundle.fields:
            # Of evaluation, a mask keeps its own size: the task brings the logits there.
            assert name != "train" or samples["mask"].shape == images[:, 0].shape
            known = {*range(len(bundle.class_names)), IGNORED_PIXEL}
            assert set(samples["mask"].unique().tolist()) <= known
        if "index" in bundle.fields:
            assert samples["index"].tolist() == list(range(bundle.sizes[name]))


@pytest.mark.parametrize("build", [name for name in names("data") if name not in _LISTED], indirect=True)
def test_no_image_is_in_two_splits(build: Any) -> None:
    seen = [
        {image.numpy().tobytes() for image in whole(split)["image"]} for split in splits(build(seed=3)).values()
    ]
    # Training images may be augmented; of the other two the very pixels are compared.
    assert not seen[1] & seen[2]
    assert not seen[0] & seen[2]


def test_one_by_one_and_batched_look_up_agree(build: Any) -> None:
    split = build(seed=0).train
    keys = [(0, 0), (num_samples(split) - 1, 3), (1, 3)]
    if not hasattr(split, "__getitems__"):
        assert all(torch.equal(value, split[keys[0]][key]) for key, value in split[keys[0]].items())
        return
    batched = split.__getitems__(keys)
    for position, key in enumerate(keys):
        sample = split[key]
        assert all(torch.equal(sample[name], batched[name][position]) for name in batched)


def test_the_same_seed_gives_the_same_samples_in_every_process(build: Any) -> None:
    first, again = splits(build(seed=1)), splits(build(seed=1))
    for name, split in first.items():
        copy = pickle.loads(pickle.dumps(again[name]))
        for key in ((0, 0), (num_samples(split) - 1, 2)):
            sample, other = split[key], copy[key]
            assert sample.keys() == other.keys()
            assert all(torch.equal(sample[entry], other[entry]) for entry in sample)


def test_reading_draws_nothing_from_the_global_streams(build: Any) -> None:
    split = build(seed=0).train
    torch.manual_seed(5)
    np.random.seed(5)
    before, numbers = torch.get_rng_state(), np.random.get_state(legacy=False)
    next(training_batches(split, batch_size=2, seed=0, start_step=0, gradient_accumulation=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state(legacy=False)) == str(numbers)
