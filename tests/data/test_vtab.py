"""VTAB-1k in its published layout: lists as splits, the published preprocessing, and every mistake named."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from image_trees import EXPECTED, SIZE, colour, picture, pixel, vtab_task, write_picture
from PIL import Image

from snell_scale.data.batches import evaluation_batches, training_batches
from snell_scale.data.images import BrokenImage
from snell_scale.data.labelled.vtab import TASKS, VtabConfig
from snell_scale.interfaces import DataBundle, InputSpec, Preprocessing


def build(root: Path, *, preprocessing: Preprocessing | None = EXPECTED, **options: Any) -> DataBundle:
    config = VtabConfig.model_validate({"task": "patch_camelyon", **options, "root": str(root)})
    return config.build(seed=0, preprocessing=preprocessing)


def test_lists_become_splits_and_labels(tmp_path: Path) -> None:
    vtab_task(tmp_path)
    bundle = build(tmp_path)
    assert bundle.sizes == {"train": 8, "validation": 4, "test": 6}
    assert bundle.class_names == ("0", "1")
    assert bundle.fields == {"image", "label", "index"}
    for split in (bundle.train, bundle.validation, bundle.test):
        for index in (0, 3):
            sample = split[index, 0]
            assert (int(sample["label"]), int(sample["index"])) == (index % 2, index)
            assert pixel(sample) == colour(index % 2, index)
    assert bundle.train[0, 0]["image"].shape == (3, SIZE, SIZE)


def test_published_protocol_trains_on_all_thousand_and_only_with_best_test(tmp_path: Path) -> None:
    vtab_task(tmp_path)
    bundle = build(tmp_path, train_on="train800val200")
    assert bundle.sizes == {"train": 12, "validation": 4, "test": 6}
    config = VtabConfig(root=str(tmp_path), task="patch_camelyon", train_on="train800val200")
    config.check_run(SimpleNamespace(evaluation=SimpleNamespace(protocol="best-test")))
    honest = SimpleNamespace(evaluation=SimpleNamespace(protocol="validation"))
    with pytest.raises(ValueError, match=r"train800val200.*evaluation\.protocol=best-test"):
        config.check_run(honest)
    VtabConfig(root=str(tmp_path), task="patch_camelyon").check_run(honest)


def test_images_are_squashed_bicubically_and_not_augmented(tmp_path: Path) -> None:
    folder = vtab_task(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images/train/train800_000000.png")
    spec = InputSpec(3, 16, 16, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bilinear", 0.9)  # the task's own filter wins
    bundle = build(tmp_path, preprocessing=Preprocessing(image=spec))
    resized = np.asarray(Image.fromarray(noise).resize((16, 16), Image.Resampling.BICUBIC)) / 255
    expected = (resized - np.array(spec.mean)) / np.array(spec.std)
    for epoch in (0, 1):
        image = bundle.train[0, epoch]["image"].permute(1, 2, 0).numpy()
        # The same Pillow filter; the rest is float32 against float64.
        np.testing.assert_allclose(image, expected, atol=1e-6)


def test_size_comes_from_the_model_or_the_config(tmp_path: Path) -> None:
    vtab_task(tmp_path)
    assert build(tmp_path, image_size=24).input_spec.height == 24
    own = build(tmp_path, preprocessing=None, image_size=24).input_spec
    assert (own.height, own.mean, own.std) == (24, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match=r"set data\.image_size"):
        build(tmp_path, preprocessing=None)


def test_workers_and_pickling_change_nothing(tmp_path: Path) -> None:
    vtab_task(tmp_path)
    bundle = pickle.loads(pickle.dumps(build(tmp_path, augmentation="crop-flip")))

    def batches(num_workers: int) -> list[torch.Tensor]:
        steps = training_batches(
            bundle.train, batch_size=4, seed=1, start_step=0, gradient_accumulation=1, num_workers=num_workers
        )
        return [next(steps).microbatches[0]["image"] for _ in range(3)]

    assert all(torch.equal(one, other) for one, other in zip(batches(0), batches(2), strict=True))


def test_a_broken_image_in_a_worker_names_the_file(tmp_path: Path) -> None:
    folder = vtab_task(tmp_path)
    (folder / "images/test/test_000002.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    bundle = build(tmp_path)
    for num_workers in (0, 1):
        with pytest.raises(BrokenImage, match=r"test_000002\.png .*; or set data\.skip_broken=true"):
            list(evaluation_batches(bundle.test, 2, num_workers=num_workers))


def test_broken_images_are_left_out_if_told_so_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = vtab_task(tmp_path)
    (folder / "images/test/test_000002.png").write_bytes(b"nothing")
    (folder / "images/train/train800_000001.png").unlink()
    bundle = build(tmp_path, skip_broken=True)
    assert bundle.sizes == {"train": 7, "validation": 4, "test": 5}
    assert [Path(name).name for name in bundle.skipped] == ["train800_000001.png", "test_000002.png"]
    assert [int(bundle.test[index, 0]["label"]) for index in range(5)] == [0, 1, 1, 0, 1]
    said = capfd.readouterr().err
    assert "18 of 18" in said
    assert "test_000002.png is no image that Pillow knows" in said
    assert "2 of 18 images cannot be used and are left out" in said
    for index in range(6):
        (folder / f"images/test/test_{index:06d}.png").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="the test split has no image"):
        build(tmp_path, skip_broken=True)


def test_classes_without_a_training_image_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = vtab_task(tmp_path)
    build(tmp_path)
    assert capfd.readouterr().err == ""
    lines = (folder / "train800.txt").read_text().splitlines()
    (folder / "train800.txt").write_text("\n".join(line for line in lines if line.endswith(" 0")))
    build(tmp_path)
    assert "1 of 2 classes have no training image: 1" in capfd.readouterr().err


def test_tasks_are_the_nineteen_with_their_classes() -> None:
    assert len(TASKS) == 19
    assert sum(TASKS.values()) == 940  # the published numbers added up by hand
    with pytest.raises(ValueError, match="did you mean 'eurosat'"):
        VtabConfig(root=".", task="eurosatt")


MISTAKES = {
    "images/test/test_000000.png": r"test\.txt, line 1: 'images/test/test_000000\.png', expected",
    "images/test/test_000000.png one": r"line 1: .*expected \"path label\" with a whole number",
    "images/test/test_000000.png -1": r"line 1: .*expected \"path label\" with a whole number",
    "images/test/test_000000.png 2": r"test\.txt, line 1: label 2, expected 0 to 1: patch_camelyon has 2 classes",
    "../other.png 0": r"test\.txt, line 1: \.\./other\.png leads out of the data set",
    "/etc/passwd 0": "leads out of the data set",
    "images/../../other.png 0": "leads out of the data set",
    "images/test/absent.png 0": r"lists 1 of 1 images that are not in .*: images/test/absent\.png; complete",
    "images/train/train800_000000.png 0": "1 images are in the train split and in the test split",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_every_mistake_in_a_list_is_named(tmp_path: Path, line: str) -> None:
    folder = vtab_task(tmp_path)
    (folder / "test.txt").write_text(line + "\n")
    with pytest.raises(ValueError, match=MISTAKES[line]):
        build(tmp_path)


def test_lists_and_folders_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.root=.*absent does not exist \(looked for from"):
        build(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no folder patch_camelyon"):
        build(tmp_path)
    folder = vtab_task(tmp_path)
    (folder / "val200.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no .*val200\.txt"):
        build(tmp_path)
    (folder / "val200.txt").write_text("\n")
    with pytest.raises(ValueError, match="the validation split has no image"):
        build(tmp_path)


def test_names_with_spaces_and_bytes_that_are_no_utf8_are_found(tmp_path: Path) -> None:
    folder = vtab_task(tmp_path)
    name = b"images/test/a caf\xe9.png"
    write_picture(folder / os.fsdecode(name), 1)
    (folder / "test.txt").write_bytes(name + b" 1\n")
    assert pixel(build(tmp_path).test[0, 0]) == colour(1)
    (folder / os.fsdecode(name)).unlink()
    with pytest.raises(ValueError, match=r"images/test/a caf\\xe9\.png"):
        build(tmp_path)


def test_grey_images_are_taken_by_colour_models_and_the_other_way_round(tmp_path: Path) -> None:
    folder = vtab_task(tmp_path)
    picture(1).convert("L").save(folder / "images/test/test_000000.png")
    assert build(tmp_path).test[0, 0]["image"].shape[0] == 3
    grey = InputSpec(1, SIZE, SIZE, (0.5,), (0.5,))
    assert build(tmp_path, preprocessing=Preprocessing(image=grey)).test[1, 0]["image"].shape == (1, SIZE, SIZE)
