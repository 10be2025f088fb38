"""Benchmark records become one table with the numbers of the records, and one figure."""

from pathlib import Path

import pandas as pd
import pytest

from analysis.bench import bench_bars, bench_columns, load_benches, main
from analysis.load import rows_of
from snell_scale.bench_records import BenchRecord, Row, write_bench


def write(
    folder: Path,
    *rows: Row,
    command: str = "bench merge",
    hardware: str = "a CPU, 2 threads",
    interrupted: bool = False,
) -> Path:
    record = BenchRecord(
        command=command,
        name=folder.name,
        created="2026-01-01T00:00:00+00:00",
        hardware=hardware,
        device="cpu",
        dtype="float32",
        num_threads=2,
        settings={},
        environment={},
        memory_source="an allocator",
        rows=rows,
        interrupted=interrupted,
    )
    return write_bench(folder, record)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    ratios = {"lora": {"median": 2.0, "p10": 1.5, "p90": 2.5}}
    write(
        tmp_path / "in" / "layers",
        Row("768→768", "lora", 5, 10.0, 9.0, 12.0, 3 * 2**20),
        Row("768→768", "snell", 5, 20.0, 19.0, 22.0, 2**20, ratios),
    )
    write(
        tmp_path / "in" / "steps",
        Row("vit", "snell", 3, 0.5, 0.4, 0.6, None, {"full": {"median": 1.125, "p10": 1.0, "p90": 1.2}}),
        Row("vit", "full", error="out of memory"),
        command="bench step",
        hardware="a GPU",
    )
    return tmp_path / "in"


def test_the_table_holds_the_records_numbers(records: Path) -> None:
    table = load_benches([records])
    assert list(table["side"]) == ["lora", "snell", "snell", "full"]
    snell = table.iloc[1]
    assert (snell["median_ms"], snell["p10_ms"], snell["p90_ms"], snell["rounds"]) == (20.0, 19.0, 22.0, 5)
    assert (snell["over_lora"], snell["over_lora_p10"], snell["over_lora_p90"]) == (2.0, 1.5, 2.5)
    assert snell["peak_mib"] == 1.0
    assert table["over_naive"].isna().all()
    assert table["error"].iloc[3] == "out of memory"


def test_the_written_files(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main([str(records), "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["bench.csv", "bench.md", "bench.png", "bench.tex"]
    assert "bench.png" in capsys.readouterr().out
    lines = (output / "bench.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "Hardware",
        "Benchmark",
        "Case",
        "Side",
        "Median ms",
        "p10–p90 ms",
        "× lora",
        "× full",
        "Peak MiB",
        "Error",
    ]
    assert cells[3] == [
        "a CPU, 2 threads", "bench merge", "768→768", "snell", "20.00", "19.00–22.00", "2.00", "–", "1.0", ""
    ]  # fmt: skip
    assert cells[4] == ["a GPU", "bench step", "vit", "snell", "0.5000", "0.4000–0.6000", "–", "1.12", "–", ""]
    assert cells[5][4:] == ["–", "–", "–", "–", "–", "out of memory"]
    read_back = pd.read_csv(output / "bench.csv")
    assert read_back["over_lora"].dropna().tolist() == [2.0]


def test_what_all_rows_share_has_no_column(records: Path) -> None:
    table = load_benches([records / "layers"])
    assert [column.heading for column in bench_columns(table)][:3] == ["Hardware", "Case", "Side"]


def test_damaged_records_are_named_and_skipped(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (records / "broken").mkdir()
    (records / "broken" / "bench.json").write_text("{")
    assert len(load_benches([records, records / "layers" / "bench.json"])) == 4
    assert "broken/bench.json is damaged" in capsys.readouterr().err


def test_no_record_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "holds no readable benchmark record" in capsys.readouterr().err


def test_notes_are_shown_where_there_are_any(tmp_path: Path) -> None:
    write(
        tmp_path / "a",
        Row("c", "snell", 3, 1.0, 1.0, 1.0, note="products by oneDNN"),
        Row("c", "lora", 3, 1.0, 1.0, 1.0),
    )
    table = load_benches([tmp_path])
    (column,) = [column for column in bench_columns(table) if column.heading == "Note"]
    assert [column.text(row) for row in rows_of(table)] == ["products by oneDNN", ""]


def test_an_interrupted_record_is_read_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a", Row("c", "snell", 2, 1.0, 1.0, 1.0), interrupted=True)
    write(tmp_path / "b", Row("c", "snell", 3, 1.0, 1.0, 1.0))
    assert path.is_file()
    assert load_benches([tmp_path])["interrupted"].tolist() == [True, False]


def test_without_times_there_is_no_figure(tmp_path: Path) -> None:
    path = write(tmp_path / "failed", Row("vit", "full", error="out of memory"))
    assert bench_bars(load_benches([path])) is None
