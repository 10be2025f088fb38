"""A study: table and pictures over the key that it varies. `python -m analysis.studies RUNS… --output DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.drawing import Picture, styles_of, write_pdf, write_png
from analysis.figures import memory_by_category, study_bars, study_line
from analysis.groups import is_number, metric_of, varied_keys, with_labels
from analysis.load import load_runs
from analysis.tables import columns, comparison, print_table, write_tables
from analysis.updates.allocation import allocation_picture, allocations, write_allocations
from analysis.updates.delta_ranks import delta_ranks, rank_picture, write_ranks

_NUMBERS_FOR_A_LINE = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write, print; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        written = [
            path
            for folder in options.runs
            for path in write_study(folder, options.output, key=options.key, memory_only=options.memory_only)
        ]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in written))
    return 0


def write_study(folder: Path, output: Path, *, key: str | None = None, memory_only: bool = False) -> list[Path]:
    """Write <study>.md, .csv, .tex and the pictures <study> and <study>-memory to `output`; returns the paths.

    Where the runs have adapters also the tables and picture <study>-ranks and <study>-ranks-matrices.csv
    (delta_ranks.py), where they recorded SNELLA's allocations the table and picture <study>-allocation
    (allocation.py). Every picture is a .png and a .pdf.

    key: the varied key of the line, e.g. "method.sparsity"; None takes the one with the most numbers. Where
    no key has at least three numbers, the cases are bars. memory_only: for runs whose score means nothing;
    no score is written, nor what was learnt, and the picture <study> is the memory.
    ValueError: no runs, runs of different metrics, or a key that the study does not vary.
    """
    runs = load_runs([folder])
    name, metric = folder.resolve().name, metric_of(runs)
    table = comparison(runs)
    shown = columns(table, metric, first="Case", with_score=not memory_only)
    print_table(table, shown, title=f"{name}: mean ± standard deviation over n seeds")
    paths = write_tables(table, shown, output, name=name)
    pictures = [memory_by_category(table, name=name if memory_only else f"{name}-memory")]
    if not memory_only:
        pictures.append(_study_picture(runs, table, metric, _line_key(table, key), name=name))
        ranks, allocated = delta_ranks(runs), allocations(runs)
        paths += write_ranks(ranks, output, name=f"{name}-ranks")
        paths += write_allocations(allocated, output, name=f"{name}-allocation")
        pictures.append(rank_picture(ranks, runs, name=f"{name}-ranks"))
        pictures.append(allocation_picture(allocated, name=f"{name}-allocation"))
    drawn = [picture for picture in pictures if picture is not None]
    return paths + [write(picture, output) for picture in drawn for write in (write_png, write_pdf)]


def _study_picture(
    runs: pd.DataFrame, table: pd.DataFrame, metric: str, key: str | None, *, name: str
) -> Picture | None:
    if key is None:
        return study_bars(table, metric, name=name)
    # What a line is: everything but the key and the seed.
    labelled = with_labels(runs.loc[runs["compared"]])
    lines = with_labels(runs.loc[runs["compared"]], leave_out=[key])
    line_of_label = dict(zip(labelled["label"], lines["label"].reindex(labelled.index), strict=True))
    styles = styles_of(lines)
    series = table["label"].map(line_of_label)
    return study_line(table, metric, key=key, series=series, styles=styles, name=name)


def _line_key(table: pd.DataFrame, key: str | None) -> str | None:
    """The column of the key that is drawn as a line, or None for bars."""
    varied = varied_keys(table)
    if key is not None:
        column = f"varied.{key}"
        if column not in varied:
            names = ", ".join(name.removeprefix("varied.") for name in varied) or "nothing but seeds and methods"
            raise ValueError(f"key is {key!r}, which this study does not vary; it varies: {names}")
        return column if table[column].map(is_number).any() else None
    counts = {name: table.loc[table[name].map(is_number), name].nunique() for name in varied}
    most = max(counts, key=lambda name: counts[name], default=None)
    return most if most is not None and counts[most] >= _NUMBERS_FOR_A_LINE else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis.studies", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="the folder of a study's runs; each is one study"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where tables and pictures go")
    parser.add_argument("--memory-only", action="store_true", help="the scores mean nothing: leave them out")
    parser.add_argument("--key", help="the varied key of the line, e.g. method.sparsity (default: found)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
