"""Pictures exist, have the right size and content in words, and their labels do not cover each other."""

import itertools
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from PIL import Image
from synthetic_runs import WriteRun

from analysis.drawing import WIDTH_INCHES, as_svg, new_figure, styles_of, write_pdf, write_png
from analysis.figures import accuracy_against_memory, memory_by_category, training_curves
from analysis.labels import Point, place_labels, text_box
from analysis.load import load_runs
from analysis.tables import comparison


@pytest.fixture
def table(write_run: WriteRun, tmp_path: Path) -> pd.DataFrame:
    for seed, (lora, full) in enumerate([(88.0, 91.0), (90.0, 92.0)]):
        write_run("lora", seed, top1=lora)
        write_run("full", seed, top1=full, peak_mib=(2.0, 4.0, 6.0, 8.0, 10.0))
    write_run("gps", 0, top1=None, status="oom")
    return comparison(load_runs([tmp_path]))


def test_png_is_200_dpi_of_the_stated_width(table: pd.DataFrame, tmp_path: Path) -> None:
    picture = accuracy_against_memory(table, "top1", styles_of(table))
    assert picture is not None
    path = write_png(picture, tmp_path)
    with Image.open(path) as image:
        assert image.width == round(200 * WIDTH_INCHES)
        assert image.height > 400
    assert path.stat().st_size > 5_000


def test_pictures_tell_their_content_in_words(table: pd.DataFrame) -> None:
    scatter = accuracy_against_memory(table, "top1", styles_of(table))
    bars = memory_by_category(table)
    assert scatter is not None
    assert bars is not None
    assert "LoRA 89.0 ± 1.4 at 15.0 MiB" in scatter.alt
    assert "GPS" not in scatter.alt
    assert "full fine-tuning 30.0 (parameters 2.0, gradients 4.0" in bars.alt
    assert "GPS (oom) 15.0" in bars.alt


def test_pdf_has_its_fonts_embedded_as_type_42(table: pd.DataFrame, tmp_path: Path) -> None:
    picture = memory_by_category(table)
    assert picture is not None
    path = write_pdf(picture, tmp_path)
    content = path.read_bytes()
    assert path.name == "memory-categories.pdf"
    assert content.startswith(b"%PDF")
    assert b"/FontFile2" in content  # TrueType, in the file
    assert b"/CIDFontType2" in content
    assert b"/Type3" not in content  # glyphs as drawings, which conferences refuse
    assert write_pdf(picture, tmp_path / "again").read_bytes() == content


def test_predicted_rows_are_hollow_and_hatched(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0)
    write_run("snell", 0, predicted=True)
    table = comparison(load_runs([tmp_path]))
    bars, scatter = memory_by_category(table), accuracy_against_memory(table, "top1", styles_of(table))
    assert bars is not None
    assert scatter is not None
    assert "SNELL (predicted) 15.0" in bars.alt
    rectangles = [patch for patch in bars.draw().axes[0].patches if isinstance(patch, Rectangle)]
    assert [patch.get_hatch() for patch in rectangles] == ["", "////"] * 5
    lines = [line for line in scatter.draw().axes[0].get_lines() if line.get_marker() in ("s", "o")]
    assert [line.get_markerfacecolor() == "none" for line in lines] == [False, True]


def test_a_category_that_a_record_does_not_know_counts_as_nothing(table: pd.DataFrame) -> None:
    unknown = table.assign(peak_transients_mib=float("nan"), peak_unexplained_mib=float("nan"))
    bars = memory_by_category(unknown)
    assert bars is not None
    assert "transients" not in bars.alt
    widths = [patch.get_width() for patch in bars.draw().axes[0].patches if isinstance(patch, Rectangle)]
    assert sum(widths) == pytest.approx(unknown["peak_total_mib"].sum())


def test_svg_is_repeatable_and_dark_differs_from_light(table: pd.DataFrame) -> None:
    picture = memory_by_category(table)
    assert picture is not None
    light = as_svg(picture, dark=False)
    assert light == as_svg(picture, dark=False)
    assert light != as_svg(picture, dark=True)


def test_without_figures_there_is_no_picture(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, top1=None, status="failed", memory=None)
    table = comparison(load_runs([tmp_path]))
    assert accuracy_against_memory(table, "top1", styles_of(table)) is None
    assert memory_by_category(table) is None
    empty = pd.DataFrame(columns=["label", "split", "step", "value"])
    assert training_curves(empty, "top1", {}) is None


def test_every_label_has_a_style_of_its_own() -> None:
    labels = [f"variant {index}" for index in range(20)]
    styles = styles_of(pd.DataFrame({"label": labels, "method": ["snell"] * 20}))
    assert len(set(styles.values())) == 20
    both = styles_of(pd.DataFrame({"label": ["SNELL", "LoRA"], "method": ["snell", "lora"]}))
    assert both["SNELL"] == styles["variant 0"]


def test_labels_of_a_dense_cloud_cover_nothing() -> None:
    figure, axes = new_figure(height_inches=3.6)
    points = [
        Point(f"method {index}", 10 + 0.05 * (index % 3), 90 + 0.2 * (index // 3), 0.1, "black")
        for index in range(9)
    ]
    axes.plot([5, 20], [85, 95])
    written = place_labels(axes, points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text_box(annotation, renderer) for annotation in written]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    positions = axes.transData.transform([(point.x, point.y) for point in points])
    for box, (x, y) in itertools.product(boxes, positions):
        assert not box.contains(x, y)
