"""Whether runs may be compared: what has to be the same in all of them, and where it is not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.groups import SETTINGS, value_text
from analysis.rows import CONDITIONS

FIELDS = (*SETTINGS, "metric_sources", *CONDITIONS, "skipped", "total_steps", "predicted")
_MOST_NAMES = 3


@dataclass(frozen=True)
class Unlike:
    """A field of more than one value, and the runs of each value."""

    field: str
    runs_of: dict[str, list[str]]

    def describe(self) -> str:
        """ "batch_size: 32 (4 runs: a, b, c, …), 64 (1 run: d)"."""
        parts = []
        for value, names in self.runs_of.items():
            parts.append(f"{value} ({len(names)} run{'s' if len(names) > 1 else ''}: {_first(names)})")
        return f"{self.field}: {', '.join(parts)}"


def unlike_fields(runs: pd.DataFrame, *, by: Sequence[str] = ()) -> list[Unlike]:
    """The fields of FIELDS that differ among runs that agree in the columns `by`; empty for a fair comparison.

    What one run does not know and another does differs: nothing says that it was the same.
    """
    groups = [group for _, group in runs.groupby(list(by), dropna=False, sort=False)] if by else [runs]
    found = []
    for field in FIELDS:
        if field in by or all(field_texts(group, field).nunique() <= 1 for group in groups):
            continue
        texts = field_texts(runs, field)
        runs_of: dict[str, list[str]] = {}
        for text, name in zip(texts, runs["name"].loc[texts.index], strict=True):
            runs_of.setdefault(text, []).append(str(name))
        found.append(Unlike(field, runs_of))
    return found


def field_texts(runs: pd.DataFrame, field: str) -> pd.Series:
    """The field's values in words, without the runs that ended before they could know theirs."""
    ended_early = (runs["status"] != "ok") & runs[field].isna()
    return runs.loc[~ended_early, field].map(field_text)


def check_alike(runs: pd.DataFrame, *, by: Sequence[str] = ()) -> None:
    """ValueError that names every field in which the runs differ, its values and the runs of each."""
    unlike = unlike_fields(runs, by=by)
    if unlike:
        lines = "\n".join(f"  - {difference.describe()}" for difference in unlike)
        raise ValueError(
            f"these runs are not alike, and a comparison of them would not be fair:\n{lines}\n"
            "Give fewer runs, compare within each value of a field (--by FIELD), or compare all the same "
            "(--force: everything written is then labelled)"
        )


def check_no_method_is_left_out(runs: pd.DataFrame) -> None:
    """ValueError where all runs of a method were found beside the comparison, and it would vanish."""
    lost = runs.loc[~runs["method"].isin(runs.loc[runs["compared"], "method"])]
    if not lost.empty:
        raise ValueError(
            f"all runs of {', '.join(lost['method'].unique())} were found beside a comparison and are no part of "
            f"it ({_names(lost)}): nothing was varied for them. Name their folders too to compare them, or give "
            "the comparison's folder alone (--force: compare without them)"
        )


def left_out_notes(runs: pd.DataFrame) -> list[str]:
    """Which runs are in no row because they were found beside the comparison."""
    left = runs.loc[~runs["compared"]]
    if left.empty:
        return []
    return [
        f"left out, as they were found beside the comparison and are no part of it: {_names(left)}; name their "
        "folders too to compare them"
    ]


def unknown_fields(runs: pd.DataFrame) -> list[str]:
    """The conditions that no run has in its record: they could not be checked."""
    # A run without averaged weights has no ema_decay in its record: there its absence says something.
    return [field for field in CONDITIONS if field != "ema_decay" and runs[field].isna().all()]


def field_text(value: Any) -> str:
    """A field's value as a person writes it."""
    return "not recorded" if pd.isna(value) else value_text(value)


def _names(runs: pd.DataFrame) -> str:
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {_first([str(name) for name in runs['name']])}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")


def field_name(field: str) -> str:
    """A column's name without what says that a study varied it."""
    return field.removeprefix("varied.")
