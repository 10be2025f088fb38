"""SNELLA's recorded allocations as a table and a heat map."""

import itertools
from pathlib import Path

import pytest
from adapters import record_allocations
from PIL import Image
from synthetic_runs import WriteRun

from analysis.drawing import WIDTH_INCHES, as_svg, write_png
from analysis.load import load_runs
from analysis.updates.allocation import allocation_heat_map, allocations


@pytest.fixture
def runs(write_run: WriteRun, tmp_path: Path) -> Path:
    for seed in (0, 1):
        folder = write_run("snella", seed)
        first = {"blocks.10.attn.qkv": [0.0, 0.1, 0.2], "blocks.10.mlp.fc1": [0.3]}
        second = {"blocks.10.attn.qkv": [0.5, 0.6, 0.7 + seed / 10], "blocks.10.mlp.fc1": [0.99]}
        record_allocations(folder, {100: first, 200: second})
    write_run("snell", 0)
    return tmp_path


def test_the_table_has_every_matrix_at_every_allocation_of_the_first_seed(runs: Path) -> None:
    table = allocations(load_runs([runs]))
    assert list(table["matrix"][:4]) == ["10 attn.q", "10 attn.k", "10 attn.v", "10 mlp.fc1"]
    assert list(table["step"]) == [100] * 4 + [200] * 4
    assert list(table["nonzero_percent"]) == pytest.approx([100, 90, 80, 70, 50, 40, 30, 1])
    assert set(table["label"]) == {"SNELLA"}
    assert set(table["block"]) == {"blocks.10"}


def test_the_heat_map_is_drawn_and_told(runs: Path, tmp_path: Path) -> None:
    picture = allocation_heat_map(load_runs([runs]))
    assert picture is not None
    assert "from step 100 to 200" in picture.alt
    assert "50.00 % in 10 attn.q, the most, and 1.00 % in 10 mlp.fc1, the least" in picture.alt
    with Image.open(write_png(picture, tmp_path)) as image:
        assert image.width == round(200 * WIDTH_INCHES)
    assert as_svg(picture, dark=False) == as_svg(picture, dark=False)


def test_one_allocation_has_whole_steps_on_its_axis(write_run: WriteRun, tmp_path: Path) -> None:
    record_allocations(write_run("snella", 0), {5: {"blocks.0.mlp.fc1": [0.25]}})
    picture = allocation_heat_map(load_runs([tmp_path]))
    assert picture is not None
    assert list(picture.draw().axes[0].get_xticks()) == [5, 6]


def test_a_deep_model_is_small_in_a_page(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("snella", 0)
    shares = {f"blocks.{block}.attn.qkv": [block / 40] * 3 for block in range(32)}
    record_allocations(folder, dict.fromkeys(range(0, 400, 2), shares))
    picture = allocation_heat_map(load_runs([tmp_path]))
    assert picture is not None
    assert len(as_svg(picture, dark=True)) < 300_000


def test_stages_of_a_unet_are_named_without_overlap(write_run: WriteRun, tmp_path: Path) -> None:
    """Matrices outside of blocks have names too; of two stages nearer than a line of text the larger is named."""
    layers = ["time_embedding.linear_1", "time_embedding.linear_2"]
    layers += [f"down_blocks.{n}.resnets.{m}.conv{k}" for n in range(4) for m in range(9) for k in (1, 2)]
    layers += ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_out"]
    record_allocations(write_run("snella", 0), {1: {layer: [0.5] for layer in layers}})
    picture = allocation_heat_map(load_runs([tmp_path]))
    assert picture is not None
    figure = picture.draw()
    figure.draw_without_rendering()
    ticks = figure.axes[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks] == [
        *(f"down_blocks.{n}" for n in range(4)),
        "mid_block.attentions.0",
    ]
    boxes = sorted((tick.get_window_extent() for tick in ticks), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 for lower, upper in itertools.pairwise(boxes))


def test_without_recorded_allocations_there_is_no_picture(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("snella", 0)
    assert allocation_heat_map(load_runs([tmp_path])) is None
