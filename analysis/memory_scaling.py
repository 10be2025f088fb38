"""Memory against size and ranks, savings, scaling: `python -m analysis.memory_scaling RUNS… --output DIR`."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from analysis.drawing import Picture, write_pdf, write_png
from analysis.load import Row, load_runs, rows_of
from analysis.scaling.cases import differing, has_peak, listed, memory_text, params_text, scaling_cases
from analysis.scaling.figures import memory_against_parameters, savings_by_model
from analysis.scaling.predictions import prediction_columns, prediction_sentences, predictions
from analysis.scaling.rank_figures import communication_bars, memory_against_ranks, speed_against_ranks
from analysis.scaling.ranks import rank_scaling, scaling_columns, scaling_sentences
from analysis.scaling.savings import PUBLISHED_COLUMNS, published_table, saving_columns, saving_sentences, savings
from analysis.scaling.traffic import traffic, traffic_columns, traffic_sentences
from analysis.tables import Column, filled, number, print_table, source, write_tables

_MOST_PRINTED, _MOST_LISTED = 60, 12
# Columns of the table of memory where they differ, under these headings.
_SETTINGS = {
    "precision": "Precision",
    "activation_checkpointing": "Checkpointing",
    "microbatch_size": "Microbatch",
    "image_size": "Pixels",
    "frozen_dtype": "Frozen",
    "fused_attention": "Fused attention",
    "optimizer": "Optimizer",
    "dataset": "Data",
    "task": "Task",
    "memory_source": "Counted by",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write, print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.memory_scaling", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders above them")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is written")
    options = parser.parse_args(arguments)
    try:
        written = write_memory_scaling(load_runs(options.runs), options.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in written))
    return 0


def write_memory_scaling(runs: pd.DataFrame, output: Path) -> list[Path]:
    """Write tables (.md, .csv, .tex) and figures (.png, .pdf) to `output`, and what they say to summary.md.

    memory, predictions, savings, savings-published, scaling and communication; memory-parameters,
    memory-savings, memory-ranks, scaling-speed and communication. What there are no data for is not written.
    ValueError: no run has a peak of memory.
    """
    cases = scaling_cases(runs)
    if cases["peak_mib"].isna().all():
        raise ValueError(
            "none of these runs has a measured or predicted peak of memory; give runs that trained a step"
        )
    checked, saved, scaled, told = predictions(cases), savings(cases), rank_scaling(cases), traffic(cases)
    tables = {
        "memory": (cases, memory_columns(cases)),
        "predictions": (checked, prediction_columns(checked)),
        "savings": (saved, saving_columns(saved)),
        "savings-published": (published_table(), PUBLISHED_COLUMNS),
        "scaling": (scaled, scaling_columns(scaled)),
        "communication": (told, traffic_columns(told)),
    }
    paths = [path for name, (table, shown) in tables.items() for path in _write_table(table, shown, output, name)]
    sentences = [
        *coverage(cases),
        *prediction_sentences(checked),
        *saving_sentences(saved),
        *scaling_sentences(scaled),
        *traffic_sentences(told),
    ]
    paths.append(_write_summary(sentences, output))
    pictures = (
        memory_against_parameters(cases),
        savings_by_model(saved),
        memory_against_ranks(scaled),
        speed_against_ranks(scaled),
        communication_bars(told),
    )
    return paths + _write_pictures(pictures, output)


def memory_columns(cases: pd.DataFrame) -> list[Column]:
    """How `scaling_cases` are shown: conditions where they differ, categories that hold something."""
    told = differing(cases, tuple(_SETTINGS))
    shown = [
        Column("Model", "model", lambda row: str(row["model"]), is_number=False),
        Column("Model size", "num_total_params", lambda row: params_text(row["num_total_params"])),
        Column("Method", "label", lambda row: row["label"], is_number=False),
        Column("Trained %", "trainable_percent", lambda row: number(row["trainable_percent"], digits=2)),
        Column("Engine", "engine", lambda row: row["engine"], is_number=False),
        Column("Ranks", "world_size", lambda row: str(row["world_size"])),
        Column("Batch", "batch_size", lambda row: str(row["batch_size"])),
    ]
    shown += [Column(_SETTINGS[name], name, _setting(name), is_number=False) for name in told]
    shown.append(Column("Peak per rank", "peak_mib", lambda row: memory_text(row["peak_mib"])))
    shown += [Column(name.capitalize(), key, _memory(key)) for name, key in filled(cases)]
    shown.append(Column("Source", "predicted", lambda row: source(row["predicted"]), is_number=False))
    if (cases["status"] != "ok").any():
        shown.append(Column("Status", "status", lambda row: row["status"], is_number=False))
    return shown


def coverage(cases: pd.DataFrame) -> list[str]:
    """What there is, what of it is predicted, and what ran out of memory."""
    peaks = has_peak(cases)
    sizes, ranks = peaks["num_total_params"].dropna(), peaks["world_size"]
    predicted = int(peaks["predicted"].sum())
    ends = list(dict.fromkeys(params_text(size) for size in (sizes.min(), sizes.max()))) if len(sizes) else []
    span = f", of {' to '.join(ends)} parameters" if ends else ""
    told = [
        f"{len(peaks)} cases with a peak of memory{span}, on {ranks.min()} to {ranks.max()} ranks: "
        f"{len(peaks) - predicted} measured, {predicted} predicted by `snell-scale estimate` (nothing ran)."
    ]
    sources = sorted(set(peaks.loc[~peaks["predicted"], "memory_source"].dropna()))
    if len(sources) > 1:
        told.append(
            f"Memory was counted in several ways ({', '.join(sources)}), and is compared within each only."
        )
    beyond = cases.loc[cases["status"] == "oom"]
    for predicted, verb in ((False, "that ran out of memory"), (True, "predicted to run out of memory")):
        names = [_case_told(row) for row in rows_of(beyond.loc[beyond["predicted"] == predicted])]
        if names:
            told.append(f"Cases {verb}: {len(names)}. {listed(names, most=_MOST_LISTED)}.")
    return told


def _case_told(row: Row) -> str:
    ranks = "1 rank" if row["world_size"] == 1 else f"{row['world_size']} ranks"
    need = f" ({memory_text(row['peak_mib'])} per rank)" if row["predicted"] else ""
    return f"{row['label']}, {row['model']} on {row['engine']} with {ranks}, batch {row['batch_size']}{need}"


def _setting(name: str) -> Callable[[Row], str]:
    return lambda row: "–" if pd.isna(row[name]) else str(row[name])


def _memory(key: str) -> Callable[[Row], str]:
    return lambda row: memory_text(0.0 if math.isnan(row[key]) else row[key])


def _write_table(table: pd.DataFrame, shown: Sequence[Column], output: Path, name: str) -> list[Path]:
    """Write and print it, where there is something in it."""
    if table.empty:
        return []
    title = name if len(table) <= _MOST_PRINTED else f"{name}: the first {_MOST_PRINTED} of {len(table)} rows"
    print_table(table.head(_MOST_PRINTED), shown, title=title)
    # What only tells which rows belong together is no figure.
    told = table.drop(columns=["job", "setting", "series_key", "kept"], errors="ignore")
    return write_tables(told, shown, output, name=name)


def _write_summary(sentences: Sequence[str], output: Path) -> Path:
    text = "\n".join(f"- {sentence}" for sentence in sentences) + "\n"
    print(text)
    path = output / "summary.md"
    path.write_text(text, encoding="utf-8")
    return path


def _write_pictures(pictures: Sequence[Picture | None], output: Path) -> list[Path]:
    drawn = [picture for picture in pictures if picture is not None]
    return [write(picture, output) for picture in drawn for write in (write_png, write_pdf)]


if __name__ == "__main__":
    sys.exit(main())
