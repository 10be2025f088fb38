"""The comparison against numbers worked out by hand, and its four ways of being written."""

import csv
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import WriteRun

from analysis.load import load_runs
from analysis.tables import columns, comparison, display, filled, latex, markdown, print_table, size, write_tables


@pytest.fixture
def table(write_run: WriteRun, tmp_path: Path) -> pd.DataFrame:
    """LoRA with three seeds, GPS with one that ended and one that diverged."""
    for seed, top1 in enumerate((88.0, 90.0, 92.0)):
        write_run("lora", seed, top1=top1, peak_mib=(1.0, 2.0, 3.0, 4.0, 5.0 + seed))
    write_run("gps", 0, top1=91.0)
    write_run("gps", 1, top1=None, status="diverged", message="loss is nan")
    return comparison(load_runs([tmp_path]))


def test_mean_std_and_n(table: pd.DataFrame) -> None:
    lora = table.iloc[0]
    assert (lora["label"], lora["n"], lora["seeds"]) == ("LoRA", 3, "0 1 2")
    # Deviations -2, 0, 2: the sample variance is 8 / 2 = 4.
    assert (lora["score_mean"], lora["score_std"]) == (90.0, 2.0)
    # Totals 15, 16, 17 MiB; temporary 5, 6, 7.
    assert (lora["peak_total_mib"], lora["peak_temporary_mib"]) == (16.0, 6.0)
    assert (lora["images_per_s"], lora["trainable_percent"]) == (1001.0, 2.5)


def test_what_did_not_end_well_keeps_its_row_and_stays_out_of_the_mean(table: pd.DataFrame) -> None:
    assert list(zip(table["label"], table["status"], table["n"], strict=True)) == [
        ("LoRA", "ok", 3),
        ("GPS", "ok", 1),
        ("GPS", "diverged", 1),
    ]
    assert table["score_mean"].iloc[1] == 91.0
    assert pd.isna(table["score_std"].iloc[1])
    assert pd.isna(table["score_mean"].iloc[2])
    assert table["peak_total_mib"].iloc[2] == 15.0


def test_runs_beside_the_comparison_are_not_in_it(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0)
    write_run("full", 0, label="pretrain", varied={})
    assert list(comparison(load_runs([tmp_path]))["method"]) == ["lora"]


def test_text_of_the_cells(table: pd.DataFrame) -> None:
    shown = columns(table, "top1")
    texts = display(table, shown)
    assert list(texts.columns[:6]) == ["Method", "Trained %", "Top-1 %", "n", "Status", "Peak MiB"]
    assert texts.iloc[0].tolist()[:6] == ["LoRA", "2.50", "90.0 ± 2.0", "3", "ok", "16.0"]
    assert texts.iloc[1]["Top-1 %"] == "91.0"
    assert texts.iloc[2].tolist()[:6] == ["GPS", "2.50", "–", "1", "diverged", "15.0"]
    assert texts.iloc[0][["Images/s", "Adapter KiB"]].tolist() == ["1,001", "10.0"]


def test_the_status_column_is_left_out_where_all_is_well(table: pd.DataFrame) -> None:
    ok = table.loc[table["status"] == "ok"]
    assert "Status" not in [column.heading for column in columns(ok, "top1")]
    without = [column.heading for column in columns(table, "top1", with_score=False)]
    assert without[:4] == ["Method", "Trained %", "n", "Status"]
    assert "Top-1 %" not in without


def test_memory_categories_that_hold_nothing_are_left_out(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, peak_mib=(1.0, 0.0, 3.0, 4.0, 5.0))
    # A record of the first schema does not know the newer categories.
    write_run("snell", 0, peak_mib=(1.0, 0.0, 3.0, 4.0, 5.0), memory={"peak": {"total_bytes": 13 * 2**20}})
    table = comparison(load_runs([tmp_path]))
    assert [name for name, _ in filled(table)] == ["parameters", "optimizer", "activations", "temporary"]
    headings = [column.heading for column in columns(table, "top1")]
    assert headings[4:9] == ["Peak MiB", "Parameters", "Optimizer", "Activations", "Temporary"]


def test_what_was_predicted_is_no_part_of_a_mean_and_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0)
    write_run("lora", 1, top1=None, predicted=True, peak_mib=(9.0, 9.0, 9.0, 9.0, 9.0))
    write_run("lora", 2, top1=None, predicted=True, status="oom")
    table = comparison(load_runs([tmp_path]))
    assert table[["predicted", "status", "n"]].values.tolist() == [
        [False, "ok", 1],
        [True, "ok", 1],
        [True, "oom", 1],
    ]
    assert list(table["peak_total_mib"]) == [15.0, 45.0, 15.0]
    texts = display(table, columns(table, "top1"))
    assert list(texts["Source"]) == ["measured", "predicted", "predicted"]
    measured = table.loc[~table["predicted"]]
    assert "Source" not in [column.heading for column in columns(measured, "top1")]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0"), (0.394, "0.39"), (1.0, "1.0"), (99.94, "99.9"), (1234.5, "1,234")]
)
def test_sizes_have_digits_enough_to_tell_them_apart(value: float, text: str) -> None:
    assert size(value) == text


def test_markdown_is_a_table_of_equal_rows(table: pd.DataFrame) -> None:
    shown = columns(table, "top1")
    texts = display(table, shown)
    texts.loc[0, "Method"] = "a|b"
    lines = markdown(texts, shown).splitlines()
    assert len(lines) == 2 + len(table)
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("| ---")
    assert lines[1].endswith("--: |")
    assert lines[2].startswith("| a\\|b")


def test_latex_is_escaped(table: pd.DataFrame) -> None:
    shown = columns(table, "top1")
    texts = display(table, shown)
    texts.loc[0, "Method"] = "50%_of~{x}\\"
    lines = latex(texts, shown).splitlines()
    assert r"Top-1 \%" in lines[3]
    assert lines[5].startswith(r"50\%\_of\textasciitilde{}\{x\}\textbackslash{} & 2.50 & 90.0 $\pm$ 2.0")
    assert lines[1] == r"\begin{tabular}{lrrrlrrrrrrrr}"


def test_latex_has_the_characters_that_its_first_encoding_lacks(table: pd.DataFrame) -> None:
    shown = columns(table, "top1")
    texts = display(table, shown)
    texts.loc[0, "Method"] = "<0.001 > a|b → 2×3 ± 1 – 2"
    line = latex(texts, shown).splitlines()[5]
    assert line.startswith(r"$<$0.001 $>$ a$|$b $\to$ 2$\times$3 $\pm$ 1 -- 2 & ")


def test_copies_of_a_run_are_no_further_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    for label, more in (("first", 0.0), ("second", 1.0)):
        for seed, top1 in enumerate((88.0, 92.0)):
            write_run("lora", seed, label=label, top1=top1 + more)
    (row,) = comparison(load_runs([tmp_path])).to_dict("records")
    assert (row["n"], row["seeds"]) == (2, "0 1")
    # 88.5 and 92.5: deviations -2 and 2, the sample variance is 8.
    assert row["score_mean"] == 90.5
    assert row["score_std"] == pytest.approx(8**0.5)


def test_files(table: pd.DataFrame, tmp_path: Path) -> None:
    paths = write_tables(table, columns(table, "top1"), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["table.md", "table.csv", "table.tex"]
    with paths[1].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["score_std"]) == 2.0
    assert rows[2]["score_mean"] == ""


def test_terminal_shows_labels_literally(table: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    table.loc[0, "label"] = "[red]LoRA"
    print_table(table, columns(table, "top1"), title="Comparison")
    out = capsys.readouterr().out
    assert "[red]LoRA" in out
    assert "90.0 ± 2.0" in out
    assert "diverged" in out
