"""Methods side by side, if they may be compared at all: `python -m analysis.compare RUNS… --output DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.comparison.columns import comparison_columns
from analysis.comparison.fairness import (
    check_alike,
    check_no_method_is_left_out,
    field_name,
    left_out_notes,
    unlike_fields,
)
from analysis.comparison.methods_table import methods_table
from analysis.comparison.notes import combinations, notes
from analysis.comparison.pareto import pareto_picture
from analysis.drawing import styles_of, write_pdf, write_png
from analysis.groups import metric_of
from analysis.load import load_runs
from analysis.tables import print_table, write_tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write, print; the exit code: 2 where the runs may not be compared."""
    options = _parser().parse_args(arguments)
    try:
        paths = write_comparison(
            load_runs(options.runs), options.output, baseline=options.baseline, by=options.by, force=options.force
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in paths))
    return 0


def write_comparison(
    runs: pd.DataFrame, output: Path, *, baseline: str | None = None, by: Sequence[str] = (), force: bool = False
) -> list[Path]:
    """Write compare.md, .csv and .tex and the Pareto pictures as PNG and PDF to `output`; print the table.

    by: fields, or varied keys, that may differ: runs are compared within each of their values. force: compare
    unlike runs all the same, and say so in everything that is written.
    ValueError: runs that are not alike, of several metrics, without the baseline, a field that is none, or a
    method of which all runs were found beside the comparison.
    """
    if not force:
        check_no_method_is_left_out(runs)
    left_out = left_out_notes(runs)
    runs, metric = runs.loc[runs["compared"]], metric_of(runs)
    by = [_column_of(runs, field) for field in by]
    if not force:
        check_alike(runs, by=by)
    unlike = [difference.field for difference in unlike_fields(runs, by=by)]
    label = f"unlike runs: {', '.join(unlike)} differ" if unlike else ""
    table = methods_table(runs, metric, baseline=baseline, by=by, fields=unlike).assign(unlike=" ".join(unlike))
    shown = comparison_columns(table, metric, fields=[*by, *unlike], label=label)
    paths = write_tables(table, shown, output, name="compare")
    told = left_out + notes(table, runs, metric, label=label, by=by)
    with (output / "compare.md").open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(f"- {note}" for note in told) + "\n")
    print_table(
        table, shown, title=" – ".join(["Methods compared: mean ± 95 % interval", *filter(None, [label])])
    )
    print("\n".join(f"- {note}" for note in told) + "\n")
    return paths + _write_pictures(table, metric, by, label, output)


def _write_pictures(table: pd.DataFrame, metric: str, by: list[str], label: str, output: Path) -> list[Path]:
    styles, paths = styles_of(table), []
    for index, (values, group) in enumerate(combinations(table, by), start=1):
        title = "\n".join(filter(None, ["Filled: on the Pareto front", values, label]))
        name = f"pareto-{index}" if by else "pareto"
        picture = pareto_picture(group, metric, styles, name=name, title=title)
        if picture is not None:
            paths += [write_png(picture, output), write_pdf(picture, output)]
    return paths


def _column_of(runs: pd.DataFrame, field: str) -> str:
    """The column of a field or of a varied key."""
    for name in (field, f"varied.{field}"):
        if name in runs:
            return name
    varied = [field_name(str(name)) for name in runs if str(name).startswith("varied.")]
    raise ValueError(f"--by {field}: the runs have no such field; what varies: {', '.join(varied) or 'nothing'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders above them")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--baseline", help="the method, or the row, that the others are tested against (lora)")
    parser.add_argument(
        "--by", action="append", default=[], metavar="FIELD", help="compare within each value of it; repeatable"
    )
    parser.add_argument("--force", action="store_true", help="compare unlike runs all the same, and label them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
