"""The parts of a report that are made from the records: its lead, its comparison and its environment."""

from collections.abc import Mapping, Sequence

import pandas as pd

from analysis.groups import value_text
from analysis.load import Row, rows_of
from analysis.report_page.page import Cell, Section, paragraph, plain_table, sortable_table
from analysis.tables import SPREAD, Column

_MAX_VALUES_SHOWN = 3
_MAX_NAMED = 8
_PAGE_SIZE = 40


def lead(runs: pd.DataFrame) -> str:
    """How many compared runs of what, in one line."""
    runs = runs.loc[runs["compared"]]
    counts = f"{len(runs)} runs, {runs['method'].nunique()} methods, seeds {_enumerated(runs['seed'])}"
    about = "; ".join(f"{name} {_enumerated(runs[name])}" for name in ("dataset", "model", "engine", "precision"))
    predicted = int(runs["predicted"].sum())
    source = f" Predicted, not measured: {predicted} of them." if predicted else ""
    return paragraph(f"{counts}. {about}.{source}".replace(". dataset", ". Dataset"), kind="lead")


def comparison_table(table: pd.DataFrame, shown: Sequence[Column], colors: Mapping[str, str]) -> str:
    """The rows of `comparison`, each with the colour that its label has in the plots."""
    caption = (
        f"Test scores are {SPREAD}; memory is the peak of a training step in MiB (2^20 bytes), in all and by "
        "what it is for. A heading sorts."
    )
    return shown_table("comparison-table", caption, table, shown, colors=colors)


def shown_table(
    identifier: str,
    caption: str,
    table: pd.DataFrame,
    shown: Sequence[Column],
    *,
    colors: Mapping[str, str] | None = None,
) -> str:
    """A table as its columns show it. colors: label → the colour of a dot before it."""
    headings = [Cell(column.heading, kind="number" if column.is_number else "") for column in shown]
    rows = [[_shown_cell(row, column, colors or {}) for column in shown] for row in rows_of(table)]
    return sortable_table(identifier, caption, headings, rows, page_size=_PAGE_SIZE)


def environment_section(environments: pd.DataFrame, *, num_runs: int) -> list[Section]:
    """What the runs ran on; where they differ, what is different. No section where no run tells it."""
    if environments.empty:
        return []
    rows = [(str(name), _values(environments[name])) for name in environments]
    caption = f"Read from the environment.json of {len(environments)} of {num_runs} runs."
    return [Section("environment", "Environment", plain_table("environment-table", caption, rows))]


def _shown_cell(row: Row, column: Column, colors: Mapping[str, str]) -> Cell:
    kind = "number" if column.is_number else "bad" if column.key == "status" and row["status"] != "ok" else ""
    color = colors.get(row["label"]) if column.key == "label" else None
    return Cell(column.text(row), row[column.key], kind=kind, color=color)


def _values(values: pd.Series) -> str:
    """The one value, or the values with how many runs have each."""
    texts = values.map(lambda value: "–" if value is None or pd.isna(value) else str(value))
    counts = texts.value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    shown = [f"{value} ({count} runs)" for value, count in counts.head(_MAX_VALUES_SHOWN).items()]
    return "; ".join([*shown, *([f"{len(counts) - len(shown)} more"] if len(counts) > len(shown) else [])])


def _enumerated(values: pd.Series) -> str:
    texts = [value_text(value) for value in sorted(values.unique())]
    shown = texts if len(texts) <= _MAX_NAMED else [*texts[:_MAX_NAMED], f"{len(texts) - _MAX_NAMED} more"]
    return ", ".join(shown)
