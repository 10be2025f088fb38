"""Benchmark records as one table and one figure. `python -m analysis.bench RECORD… --output DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.drawing import WIDTH_INCHES, Picture, Style, color_of, method_style, text_color, write_png
from analysis.load import rows_of
from analysis.rows import MIB, Row
from analysis.tables import Column, number, size, write_tables
from snell_scale.bench_records import BASES, FIGURES, FILE_NAME, BenchRecord, read_bench

# Sides that no table of methods has; each but these has its method's colour.
_OTHER_SIDES = {
    "frozen": Style("#8C8C8C", "o"),
    "naive": Style("#AA3377", "o"),
    "snell-cold": Style("#EE9966", "o"),
    "snell-mkl": Style("#CC6677", "o"),
    "bare": Style("#8C8C8C", "o"),
    "loop": Style("#0084D1", "o"),
    "single": Style("#8C8C8C", "o"),
    "ddp": Style("#0084D1", "o"),
    "fsdp2": Style("#009E73", "o"),
    "zero1": Style("#F0B070", "o"),
    "zero2": Style("#E69F00", "o"),
    "zero3": Style("#D55E00", "o"),
}
_TEXT = ("record", "command", "hardware", "dtype", "interrupted", "case", "side", "note", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write, say where; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.bench", description=__doc__)
    parser.add_argument(
        "records", nargs="+", type=Path, metavar="RECORD", help="bench.json, or folders at any depth above some"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is written")
    options = parser.parse_args(arguments)
    try:
        paths = write_bench_tables(options.records, options.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"wrote {path}" for path in paths))
    return 0


def write_bench_tables(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write bench.md, .csv and .tex, and bench.png where anything was timed. ValueError without any record."""
    table = load_benches(paths)
    written = write_tables(table, bench_columns(table), output, name="bench")
    picture = bench_bars(table)
    return written if picture is None else [*written, write_png(picture, output)]


def load_benches(paths: Sequence[Path]) -> pd.DataFrame:
    """One row per record, case and side, in the order of the records; a damaged one is named on stderr.

    Columns: record, command, hardware, dtype, num_threads, interrupted (a bool), case, side, rounds, median_ms,
    p10_ms, p90_ms, peak_mib (MiB = 2^20 bytes), over_<base> with _p10 and _p90 (time over the base side's), the
    records' further figures by their own names, note, error; NaN where a record has no value. ValueError: no
    readable record.
    """
    rows = []
    for path in _record_files(paths):
        try:
            rows += _rows(read_bench(path))
        except ValueError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not rows:
        raise ValueError(
            f"{', '.join(map(str, paths))}: holds no readable benchmark record; make one with `snell-scale bench`"
        )
    table = pd.DataFrame(rows)
    for column in table.columns.difference(_TEXT):
        table[column] = pd.to_numeric(table[column])
    return table


def bench_columns(table: pd.DataFrame) -> list[Column]:
    """How `load_benches`' rows are shown; what all rows share is left out, but for the hardware."""
    words = [("hardware", "Hardware"), ("dtype", "Type"), ("command", "Benchmark")]
    kept = [pair for pair in words if pair[0] == "hardware" or table[pair[0]].nunique() > 1]
    shown = [Column(heading, key, lambda row, key=key: row[key], is_number=False) for key, heading in kept]
    shown += [
        Column("Case", "case", lambda row: row["case"], is_number=False),
        Column("Side", "side", lambda row: row["side"], is_number=False),
        Column("Median ms", "median_ms", lambda row: _milliseconds(row["median_ms"])),
        Column("p10–p90 ms", "p10_ms", _spread),
    ]
    for base in BASES:
        key = f"over_{base}"
        if table[key].notna().any():
            shown.append(Column(f"× {base}", key, lambda row, key=key: number(row[key], digits=2)))
    shown.append(Column("Peak MiB", "peak_mib", lambda row: size(row["peak_mib"])))
    for key, figure in FIGURES.items():
        if key in table and table[key].notna().any():
            heading = figure.heading[:1].upper() + figure.heading[1:]
            shown.append(Column(heading, key, lambda row, key=key: _figure(row, key)))
    for heading, key in (("Note", "note"), ("Error", "error")):
        if table[key].notna().any():
            shown.append(Column(heading, key, lambda row, key=key: _told(row[key]), is_number=False))
    return shown


def bench_bars(table: pd.DataFrame) -> Picture | None:
    """Per record and case: the sides' times with p10–p90, and their peak memory. None where nothing was timed."""
    timed = table.loc[table["median_ms"].notna()]
    if timed.empty:
        return None
    groups = [group for _, group in timed.groupby(["record", "hardware", "case"], sort=False)]

    def draw() -> Figure:
        heights = [len(group) for group in groups]
        inches = sum(0.75 + 0.22 * height for height in heights)
        figure = Figure(figsize=(1.5 * WIDTH_INCHES, inches), layout="constrained")
        axes = figure.subplots(
            len(groups), 2, squeeze=False, gridspec_kw={"height_ratios": [height + 1 for height in heights]}
        )
        for (left, right), group in zip(axes, groups, strict=True):
            first = group.iloc[0]
            left.set_title(f"{first['case']} ({first['hardware']}, {first['dtype']})", loc="left")
            _draw_times(left, rows_of(group))
            _draw_memory(right, rows_of(group))
        return figure

    told = [f"{row['case']}, {row['side']}: {_milliseconds(row['median_ms'])} ms" for row in rows_of(timed)]
    return Picture("bench", "Time and memory by side", f"Bars of time and memory. {'; '.join(told)}.", draw)


def _draw_times(axes: Axes, rows: list[Row]) -> None:
    for position, row in enumerate(rows):
        median = row["median_ms"]
        axes.barh(position, median, height=0.68, color=_color(row["side"]))
        spread = [[max(0.0, median - row["p10_ms"])], [max(0.0, row["p90_ms"] - median)]]
        axes.errorbar(median, position, xerr=spread, color=text_color(), capsize=2, elinewidth=1)
        _annotate(axes, max(median, row["p90_ms"]), position, _milliseconds(median))
    _finish(axes, "Median of the rounds, p10–p90 (ms)", [row["side"] for row in rows])


def _draw_memory(axes: Axes, rows: list[Row]) -> None:
    if all(np.isnan(row["peak_mib"]) for row in rows):
        axes.set_axis_off()
        return
    for position, row in enumerate(rows):
        if not np.isnan(row["peak_mib"]):
            axes.barh(position, row["peak_mib"], height=0.68, color=_color(row["side"]))
            _annotate(axes, row["peak_mib"], position, size(row["peak_mib"]))
    _finish(axes, "Peak memory (MiB)", [""] * len(rows))


def _annotate(axes: Axes, x: float, y: int, text: str) -> None:
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center_baseline", fontsize=8)


def _finish(axes: Axes, label: str, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)


def _color(side: str) -> str:
    """A side may end in a number of processes ("ddp x2")."""
    return color_of(_OTHER_SIDES.get(side.split(" ")[0]) or method_style(side))


def _milliseconds(value: float) -> str:
    """Three or four figures: kernels take microseconds, steps seconds."""
    return number(value, digits=4 if value < 1 else 2 if value < 100 else 0)


def _figure(row: Row, key: str) -> str:
    return number(row[key] / FIGURES[key].divisor, digits=FIGURES[key].digits)


def _told(value: object) -> str:
    return value if isinstance(value, str) else ""


def _spread(row: Row) -> str:
    if np.isnan(row["p10_ms"]):
        return _milliseconds(row["p10_ms"])
    return f"{_milliseconds(row['p10_ms'])}–{_milliseconds(row['p90_ms'])}"


def _record_files(paths: Sequence[Path]) -> list[Path]:
    """Every record once, in the order given; a path that is a file is taken as one whatever its name."""
    files = [file for path in paths for file in (sorted(path.rglob(FILE_NAME)) if path.is_dir() else [path])]
    return list(dict.fromkeys(files))


def _rows(record: BenchRecord) -> list[Row]:
    about = {
        "record": record.name,
        "command": record.command,
        "hardware": record.hardware,
        "dtype": record.dtype,
        "num_threads": record.num_threads,
        "interrupted": record.interrupted,
    }
    rows = []
    for row in record.rows:
        over = {}
        for base in BASES:
            spread = row.ratios.get(base, {})
            over[f"over_{base}"] = spread.get("median")
            over |= {f"over_{base}_{name}": spread.get(name) for name in ("p10", "p90")}
        rows.append(
            {
                **about,
                "case": row.case,
                "side": row.side,
                "rounds": row.rounds,
                "median_ms": row.median_ms,
                "p10_ms": row.p10_ms,
                "p90_ms": row.p90_ms,
                "peak_mib": None if row.peak_bytes is None else row.peak_bytes / MIB,
                **over,
                **row.figures,
                "note": row.note,
                "error": row.error,
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
