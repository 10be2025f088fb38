"""Pictures of segmentations, and what ranks agree on before they evaluate."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from snell_scale import registry
from snell_scale.config import resolve
from snell_scale.interfaces import IGNORED_PIXEL, Batch, InputSpec
from snell_scale.run import run
from snell_scale.tasks.overlays import Example, class_colours, overlay, picture_of
from tests.conftest import TINY
from tests.tasks.parts import Samples
from tests.tasks.test_segmentation import NAMES, Empty, Pixelwise, example, metrics_of, task_of

SPEC = InputSpec(3, 8, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def samples(number: int) -> list[Batch]:
    batch = example(images=number)
    return [{name: tensor[index] for name, tensor in batch.items()} for index in range(number)]


def test_the_first_samples_are_shown() -> None:
    task = task_of(shown=2)
    heights = []
    for number in (1, 2, 5):
        (picture,) = task.pictures(Pixelwise(), Samples(samples(number))).values()
        assert picture.dtype == torch.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        heights.append(picture.shape[0])
    assert heights[0] < heights[1] == heights[2]


def test_colours_differ_and_the_background_is_not_painted() -> None:
    names = ["background", *(str(number) for number in range(30))]
    colours = class_colours(names)
    assert colours[0] is None
    assert len(set(colours[1:])) == 30
    assert class_colours([*names, "more"])[:31] == colours  # a class keeps its colour beside other classes


def test_an_overlay_paints_classes_and_hatches_ignored_pixels() -> None:
    image = torch.full((3, 24, 24), 100, dtype=torch.uint8)
    mask = torch.zeros(24, 24, dtype=torch.int64)
    mask[:12, :12], mask[12:] = 1, IGNORED_PIXEL
    painted = overlay(image, mask, class_colours(NAMES))
    assert ((painted[:, :12, 12:].int() - 100).abs() <= 1).all()  # background, grey as it was; rounded
    assert len(colours_in(painted[:, :12, :12])) == 1
    assert max(map(max, colours_in(painted[:, :12, :12]))) > 120
    stripes = colours_in(painted[:, 12:])
    assert len(stripes) == 2
    assert all(red == green == blue for red, green, blue in stripes)


def colours_in(area: Tensor) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in area.flatten(1).T.tolist()}


def test_image_truth_and_prediction_stand_side_by_side_at_the_masks_size() -> None:
    truth, prediction = torch.ones(96, 192, dtype=torch.int64), torch.zeros(96, 192, dtype=torch.int64)
    blue = torch.tensor([-2.0, -2.0, 2.0]).view(3, 1, 1).expand(3, 48, 96)  # normalised (0, 0, 1)
    picture = picture_of([Example(blue, truth, prediction)], spec=SPEC, class_names=NAMES)
    row = picture[18 + 48]  # the middle of the tiles, below their titles
    assert row[96].tolist() == [0, 0, 255]
    middle, right = row[192 + 8 + 96], row[2 * (192 + 8) + 96]
    assert right[0] == right[1] == right[2]  # grey: nothing painted
    assert len(set(middle.tolist())) > 1


def test_large_masks_are_shown_smaller() -> None:
    truth = torch.ones(600, 2048, dtype=torch.int64)
    truth[:, 1024:] = IGNORED_PIXEL
    image = torch.zeros(3, 32, 96)
    picture = picture_of([Example(image, truth, torch.zeros_like(truth))], spec=SPEC, class_names=NAMES)
    assert picture.shape[1] == 3 * 512 + 2 * 8
    row = picture[18 + 75, 520 : 520 + 512].tolist()  # the truth
    assert all(len(set(pixel)) > 1 for pixel in row[:256])  # painted
    assert all(len(set(pixel)) == 1 for pixel in row[256:])  # hatched in grey


@pytest.mark.parametrize("busiest", [9, 14])
def test_every_rank_calls_the_model_as_often_as_the_busiest(busiest: int) -> None:
    """Where weights are sharded, a rank that calls the model less often leaves the others waiting forever."""
    batch, alone, model = example(images=1, size=(12, 12)), Pixelwise(), Pixelwise()
    settings: dict[str, Any] = {"inference": "sliding", "window": 4, "stride": 4, "windows_per_forward": 1}
    expected = metrics_of(task_of(**settings), alone, batch)
    told: list[int] = []

    def gather(value: int) -> list[int]:
        told.append(value)
        return [value, busiest]

    engine: Any = SimpleNamespace(ranks=SimpleNamespace(world_size=2, gather=gather))
    task = task_of(**settings)
    task.prepare(None, engine)  # pyright: ignore[reportArgumentType]
    evaluation = task.evaluation(model, Empty())
    evaluation.add(model, batch)
    assert told == [len(alone.shapes)] == [9]
    assert len(model.shapes) == busiest
    assert evaluation.metrics(evaluation.sums()) == expected


@pytest.mark.parametrize(("every", "during"), [(None, []), (1, [2, 4, 5]), (2, [4])])
def test_a_run_shows_the_test_split_and_if_told_so_what_it_sees_on_the_way(
    tmp_path: Path, every: int | None, during: list[int]
) -> None:
    scenes = {"train_scenes": 8, "validation_scenes": 2, "test_scenes": 2}
    arguments = {"patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    content = {
        **TINY,
        "output_dir": str(tmp_path),
        "data": {"name": "shapes", "image_size": 32, **scenes},
        "task": {"name": "segmentation", "shown": 1},
        "model": {"name": "timm_segmentation", "architecture": "vision_transformer", "arguments": arguments},
        "method": {"name": "probe"},
        "training": {**TINY["training"], "steps": 5},
        "evaluation": {"every_steps": 2, "batch_size": 2, "pictures_every": every},
    }
    run(resolve(content, [], config_class=registry.config_class, source="test"), quiet=True)
    names = {path.name for path in (tmp_path / "tiny" / "pictures").iterdir()}
    assert names == {"predictions.png", *(f"step-{step:06d}-predictions.png" for step in during)}
