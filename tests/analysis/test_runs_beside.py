"""Runs found beside a comparison: they are named, no method vanishes with them, and naming them compares them."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import WriteRun

from analysis.compare import main

Compare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compare(tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> Compare:
    """(exit code, stdout, stderr) of a comparison of LoRA and SNELL, and of the paths and options given."""
    for seed in range(3):
        write_run("lora", seed, top1=90.0 + seed)
        write_run("snell", seed, top1=93.0 + seed)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(tmp_path / "study"), *map(str, arguments), "--output", str(tmp_path / "out")])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_they_are_named(compare: Compare, write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 7, study="study/alone", varied={})
    code, out, _ = compare()
    assert code == 0
    left_out = (
        "left out, as they were found beside the comparison and are no part of it: 1 run: study/alone/lora-"
    )
    assert left_out in out
    assert left_out in (tmp_path / "out" / "compare.md").read_text()


def test_no_method_vanishes_with_them(compare: Compare, write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run("full", seed, study="study/alone", varied={})
    code, _, err = compare()
    assert code == 2
    assert "all runs of full were found beside a comparison" in err
    assert "(3 runs: study/alone/full-seed0, study/alone/full-seed1, study/alone/full-seed2)" in err
    code, out, _ = compare("--force")
    assert code == 0
    assert "left out, " in out
    table = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert set(table["method"]) == {"lora", "snell"}


def test_their_folder_named_too_compares_them(compare: Compare, write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run("full", seed, study="study/alone", varied={})
    code, out, _ = compare(tmp_path / "study" / "alone")
    assert code == 0
    assert "left out" not in out
    table = pd.read_csv(tmp_path / "out" / "compare.csv").set_index("method")
    assert table["n"].to_dict() == {"lora": 3, "snell": 3, "full": 3}
