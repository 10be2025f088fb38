"""A study becomes a line over numbers, or bars over cases, with its tables."""

from pathlib import Path

import pandas as pd
import pytest
from adapters import record_allocations, write_peft_adapter
from synthetic_runs import WriteRun

from analysis.load import load_runs
from analysis.studies import _line_key, main, write_study
from analysis.tables import comparison


@pytest.fixture
def sparsity_study(write_run: WriteRun, tmp_path: Path) -> Path:
    for seed in (0, 1):
        for sparsity in (None, 0.0, 0.5, 0.99):
            write_run(
                "snell",
                seed,
                study="sparsity",
                top1=90.0 + seed,
                label=f"s{sparsity}",
                varied={"method.sparsity": sparsity},
            )
    return tmp_path / "sparsity"


@pytest.fixture
def kernel_study(write_run: WriteRun, tmp_path: Path) -> Path:
    for kernel in ("linear", "distance"):
        write_run("snell", 0, study="kernels", label=kernel, varied={"method.kernel": kernel})
    return tmp_path / "kernels"


def test_numbers_make_a_line(sparsity_study: Path, tmp_path: Path) -> None:
    table = comparison(load_runs([sparsity_study]))
    assert _line_key(table, None) == "varied.method.sparsity"
    paths = write_study(sparsity_study, tmp_path / "out")
    assert [path.name for path in paths] == [
        "sparsity.md",
        "sparsity.csv",
        "sparsity.tex",
        "sparsity-memory.png",
        "sparsity-memory.pdf",
        "sparsity.png",
        "sparsity.pdf",
    ]
    assert all(path.stat().st_size > 5_000 for path in paths if path.suffix in (".png", ".pdf"))
    lines = paths[0].read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "sparsity=0",
        "sparsity=0.5",
        "sparsity=0.99",
        "sparsity=null",
    ]
    assert "90.5 ± 0.7" in lines[2]


def test_words_make_bars(kernel_study: Path, tmp_path: Path) -> None:
    assert _line_key(comparison(load_runs([kernel_study])), None) is None
    names = [path.name for path in write_study(kernel_study, tmp_path / "out")]
    assert "kernels.png" in names


def test_memory_only_leaves_the_score_out(kernel_study: Path, tmp_path: Path) -> None:
    paths = write_study(kernel_study, tmp_path / "out", memory_only=True)
    assert [path.name for path in paths if path.suffix == ".png"] == ["kernels.png"]
    assert "Top-1" not in paths[0].read_text()
    assert "Peak MiB" in paths[0].read_text()


def test_series_of_a_line_are_the_other_keys(write_run: WriteRun, tmp_path: Path) -> None:
    for method in ("lora", "snell"):
        for size in (16, 32, 64):
            varied = {"method.name": method, "training.batch_size": size}
            write_run(method, 0, label=f"{method}{size}", varied=varied, batch_size=size)
    paths = write_study(tmp_path / "study", tmp_path / "out")
    assert (tmp_path / "out" / "study.png") in paths


def test_a_key_that_is_not_varied_is_refused_by_name(
    sparsity_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(sparsity_study), "--output", str(tmp_path / "out"), "--key", "method.r"]
    assert main(arguments) == 2
    assert "it varies: method.sparsity" in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "snell-scale compare" in capsys.readouterr().err


def test_what_was_learnt_is_written_where_it_can_be_read(write_run: WriteRun, tmp_path: Path) -> None:
    for sparsity in (0.0, 0.5):
        folder = write_run("snell", 0, study="learnt", label=f"s{sparsity}", varied={"method.sparsity": sparsity})
        write_peft_adapter(folder, "snell", sparsity=sparsity)
    record_allocations(write_run("snella", 0, study="learnt"), {5: {"blocks.0.mlp.fc1": [0.25]}})
    names = {path.name for path in write_study(tmp_path / "learnt", tmp_path / "out")}
    assert names >= {"learnt-ranks.png", "learnt-ranks.tex", "learnt-ranks-matrices.csv", "learnt-allocation.png"}
    text = (tmp_path / "out" / "learnt-ranks.md").read_text()
    assert "Numerical rank misleads" in text
    assert "SNELLA is left out" in text
    ranks = pd.read_csv(tmp_path / "out" / "learnt-ranks.csv")
    for label, percent in (("SNELL, sparsity=0", 100), ("SNELL, sparsity=0.5", 50)):
        mean = ranks.loc[ranks["label"] == label, "nonzero_percent"].mean()
        assert mean == pytest.approx(percent, abs=0.3)  # one entry at the threshold is zero
    assert pd.read_csv(tmp_path / "out" / "learnt-allocation.csv")["nonzero_percent"].tolist() == [75.0]
    memory_only = write_study(tmp_path / "learnt", tmp_path / "memory", memory_only=True)
    assert not [path for path in memory_only if "ranks" in path.name or "allocation" in path.name]
