"""Names of points and bars: short ones as they are, long ones as numbers with a key, or cut in their middle."""

from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from synthetic_runs import WriteRun

from analysis.drawing import styles_of
from analysis.figures import accuracy_against_memory, memory_by_category
from analysis.labels import cut, names_of_points, on_two_lines
from analysis.load import load_runs
from analysis.tables import comparison

_LONG = "a name that somebody thought about for long " * 5


def test_points_have_numbers_where_one_name_is_too_long() -> None:
    assert names_of_points(["LoRA", "SNELL"]) == {"LoRA": "LoRA", "SNELL": "SNELL"}
    assert names_of_points(["LoRA", "x" * 40]) == {"LoRA": "LoRA", "x" * 40: "x" * 40}
    assert names_of_points(["LoRA", "x" * 41]) == {"LoRA": "1", "x" * 41: "2"}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("SNELL, r=8", "SNELL, r=8"),
        ("SNELL, r=8, sparsity=0.9, lr=0.01", "SNELL, r=8,\nsparsity=0.9, lr=0.01"),
        ("x" * 100, "x" * 14 + "…" + "x" * 13 + "\n" + "x" * 14 + "…" + "x" * 13),
    ],
)
def test_a_bar_has_at_most_two_short_lines(label: str, expected: str) -> None:
    assert on_two_lines(label) == expected


def test_cut_keeps_both_ends() -> None:
    assert cut("beginning-and-end", 9) == "begi…-end"
    assert cut("short", 9) == "short"


def test_long_names_stay_inside_the_pictures(write_run: WriteRun, tmp_path: Path) -> None:
    for number in range(4):
        varied = {"method.name": "lora", "method.note": f"{_LONG}{number}"}
        write_run("lora", 0, label=str(number), top1=90.0 + number, varied=varied)
    table = comparison(load_runs([tmp_path]))
    scatter, bars = accuracy_against_memory(table, "top1", styles_of(table)), memory_by_category(table)
    assert scatter is not None
    assert bars is not None
    figure = scatter.draw()
    FigureCanvasAgg(figure).draw()
    key = figure.legends[0]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2", "3", "4"]
    assert [text.get_text()[0] for text in key.get_texts()] == ["1", "2", "3", "4"]
    box = key.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert figure.axes[0].get_window_extent().height > 0.5 * 3.6 * figure.dpi
    figure = bars.draw()
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].get_window_extent().width > figure.bbox.width / 3
