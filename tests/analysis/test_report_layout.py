"""The report's layout in a headless Chromium: long names, a phone's width, axes that say how they are drawn."""

from pathlib import Path

import pytest
from browser import Browser
from synthetic_runs import write_synthetic_run

from analysis.report import write_report

pytestmark = pytest.mark.browser

_LONG = "a name that somebody thought about for long, " * 5


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants with long names, whose score and memory spread over more than a factor of 30."""
    root = tmp_path_factory.mktemp("report")
    for number, (top1, peak_mib) in enumerate([(2.0, 1.0), (90.0, 100.0)]):
        varied = {"method.name": "lora", "method.note": f"{_LONG}{number}"}
        peaks = (peak_mib, 0.0, 0.0, 0.0, 0.0)
        write_synthetic_run(root, "lora", 0, label=f"{number}", top1=top1, peak_mib=peaks, varied=varied)
    return write_report([root / "study"], root / "out", title="Layout")


def test_a_score_is_never_on_a_logarithmic_axis(browser: Browser, report: Path) -> None:
    browser.open(report)
    names = browser.run("[...document.querySelectorAll('#plot-scatter .axis')].map(text => text.textContent)")
    assert names == ["Peak memory of a training step (MiB) (log)", "Top-1 % on test"]


def test_long_names_wrap_in_tables_and_are_cut_over_bars(browser: Browser, report: Path) -> None:
    browser.open(report)
    width = "document.querySelector('#comparison-table tbody .name').getBoundingClientRect().width"
    assert browser.run(width) < 400
    bars = "[...document.querySelectorAll('#plot-bars .plot text')]"
    assert "…" in browser.run(f"{bars}[0].textContent")
    ends = browser.run(f"{bars}.map(text => text.getBoundingClientRect().right)")
    assert max(ends) <= browser.run("document.querySelector('#plot-bars svg').getBoundingClientRect().right")


def test_a_phone_has_room_for_the_values_of_the_environment(browser: Browser, report: Path) -> None:
    browser.open(report, width=390, height=844)
    cells = "document.querySelector('#environment-table tbody tr').cells"
    name, value = browser.run(f"[...{cells}].map(cell => cell.getBoundingClientRect().width)")
    assert name <= 150
    assert value >= 180
    assert browser.run("document.documentElement.scrollWidth") == 390
