"""The parts of a report that are made from the records: its lead, and its three tables as HTML."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.drawing import FOREGROUND
from analysis.figures import Styles
from analysis.groups import choice_of, is_number, method_name, metric_name, metric_of, value_text, varied_keys
from analysis.load import Row, load_environments, rows_of
from analysis.page import Cell, paragraph, plain_table, sortable_table
from analysis.tables import SPREAD, Column, number, size

_MAX_VALUES_SHOWN = 3


def lead(runs: pd.DataFrame) -> str:
    """How many compared runs of what, in one line."""
    runs = runs.loc[runs["compared"]]
    counts = f"{len(runs)} runs, {runs['method'].nunique()} methods, seeds {_enumerated(runs['seed'])}"
    about = "; ".join(f"{name} {_enumerated(runs[name])}" for name in ("dataset", "model", "engine", "precision"))
    return paragraph(f"{counts}. {about}.".replace(". dataset", ". Dataset"), kind="lead")


def comparison_table(table: pd.DataFrame, shown: Sequence[Column], styles: Styles) -> str:
    """The rows of `comparison`, each with the colour it has in the pictures."""
    headings = [Cell(column.heading, kind="number" if column.is_number else "") for column in shown]
    rows = []
    for row in rows_of(table):
        cells = [_comparison_cell(row, column) for column in shown]
        color = styles[row["label"]].color
        cells[0] = Cell(row["label"], row["label"], color="currentColor" if color == FOREGROUND else color)
        rows.append(cells)
    caption = (
        f"Test scores are {SPREAD}; memory is the peak of a training step in MiB (2^20 bytes), in all and by "
        "what it is for. A heading sorts."
    )
    return sortable_table("comparison-table", caption, headings, rows)


def runs_table(runs: pd.DataFrame) -> str:
    """Every run, however it ended, with the command that makes it again."""
    metric, choice = metric_of(runs), choice_of(runs)
    keys = varied_keys(runs)
    headings = [Cell("Run"), Cell("Method"), Cell("Status"), Cell("Seed", kind="number")]
    headings += [Cell(key.removeprefix("varied."), kind=_kind(runs[key])) for key in keys]
    scores = (f"Test {metric_name(metric)}", f"Validation {metric_name(choice)}")
    numbers = (*scores, "Best step", "Peak MiB", "Seconds")
    headings += [*(Cell(heading, kind="number") for heading in numbers), Cell("Command")]
    caption = (
        "Every run that was read, with the command that makes it again. A dash: not measured, or ended before."
    )
    shown = [_with_scores_of(run, metric, choice) for run in rows_of(runs)]
    return sortable_table("runs-table", caption, headings, [_run_cells(run, runs, keys) for run in shown])


def environment_table(runs: pd.DataFrame) -> str:
    """What the runs ran on; where they differ, what is different."""
    environments = load_environments(runs)
    rows = [(str(name), _values(environments[name])) for name in environments]
    caption = f"Read from the environment.json of {len(environments)} of {len(runs)} runs."
    return plain_table("environment-table", caption, rows)


def _comparison_cell(row: Row, column: Column) -> Cell:
    kind = "number" if column.is_number else "bad" if row["status"] != "ok" else ""
    return Cell(column.text(row), row[column.key], kind=kind)


def _with_scores_of(run: Row, metric: str, choice: str) -> Row:
    """A run beside the comparison may have been judged by other metrics: in these it has no score."""
    own = {} if run["headline"] == metric else {"score": float("nan")}
    return {**run, **own, **({} if run["metric"] == choice else {"validation_score": float("nan")})}


def _run_cells(run: Row, runs: pd.DataFrame, keys: Sequence[str]) -> list[Cell]:
    command = f"snell-scale run {shlex.quote(str(Path(run['folder']) / 'config.yaml'))}"
    message = run["message"] if isinstance(run["message"], str) else None
    best_step = float("nan") if pd.isna(run["best_step"]) else float(run["best_step"])
    return [
        Cell(run["name"], run["name"]),
        Cell(method_name(run["method"]), run["method"]),
        Cell(run["status"], run["status"], kind="" if run["status"] == "ok" else "bad", detail=message),
        Cell(str(run["seed"]), run["seed"], kind="number"),
        *(_varied_cell(run[key], kind=_kind(runs[key])) for key in keys),
        Cell(number(run["score"], digits=2), run["score"], kind="number"),
        Cell(number(run["validation_score"], digits=2), run["validation_score"], kind="number"),
        Cell(number(best_step, digits=0), best_step, kind="number"),
        Cell(size(run["peak_total_mib"]), run["peak_total_mib"], kind="number"),
        Cell(number(run["seconds_total"], digits=1), run["seconds_total"], kind="number"),
        Cell(command, command, kind="code"),
    ]


def _kind(values: pd.Series) -> str:
    return "number" if values.dropna().map(is_number).all() else ""


def _varied_cell(value: Any, *, kind: str) -> Cell:
    return Cell("–", None, kind=kind) if pd.isna(value) else Cell(value_text(value), value, kind=kind)


def _values(values: pd.Series) -> str:
    """The one value, or the values with how many runs have each."""
    texts = values.map(lambda value: "–" if value is None or pd.isna(value) else str(value))
    counts = texts.value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    shown = [f"{value} ({count} runs)" for value, count in counts.head(_MAX_VALUES_SHOWN).items()]
    return "; ".join([*shown, *([f"{len(counts) - len(shown)} more"] if len(counts) > len(shown) else [])])


def _enumerated(values: pd.Series) -> str:
    return ", ".join(value_text(value) for value in sorted(values.unique()))
