"""Which runs belong together: those that differ in nothing but the seed, under one readable label."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.load import rows_of
from snell_scale import metrics

# In the order of every table and figure.
METHOD_NAMES = {
    "probe": "linear probe",
    "bias": "BitFit",
    "lora": "LoRA",
    "shira": "SHiRA",
    "klora": "kernelised LoRA",
    "snell": "SNELL",
    "snella": "SNELLA",
    "gps": "GPS",
    "full": "full fine-tuning",
}
# What a fair comparison of methods holds constant.
SETTINGS = ("model", "dataset", "task", "engine", "precision", "world_size", "batch_size", "protocol")
_NOT_A_CASE = ("varied.seed", "varied.method.name")


def with_labels(runs: pd.DataFrame, *, leave_out: Sequence[str] = ()) -> pd.DataFrame:
    """`runs` with a column `label`, sorted by method, then by the values that differ, then by seed.

    Runs of one method that differ in a varied key, or else in one of SETTINGS, have different labels; the
    columns in `leave_out` make no difference.
    """
    varied = varied_keys(runs)
    keys = [key for key in varied if key not in leave_out]
    by = ["method", *varied]
    keys += [name for name in SETTINGS if runs.groupby(by, dropna=False, sort=False)[name].nunique().max() > 1]
    several_methods = runs["method"].nunique() > 1
    names = _short_names(keys)

    labels, order = {}, {}
    for method, group in runs.groupby("method"):
        different = [key for key in keys if group[key].nunique(dropna=False) > 1]
        for index, run in zip(group.index, rows_of(group), strict=True):
            parts = [_part(names[key], run[key]) for key in different if not pd.isna(run[key])]
            if several_methods or not parts:
                parts.insert(0, method_name(str(method)))
            labels[index] = ", ".join(parts)
            values = [_sort_key(run[key]) for key in (*different, *leave_out)]
            order[index] = (_rank(str(method)), str(method), values, run["seed"])
    labelled = runs.assign(label=pd.Series(labels, dtype=object))
    return labelled.loc[sorted(order, key=lambda index: order[index])]


def method_name(method: str) -> str:
    """What a method is called in print; its own name where it has no other."""
    return METHOD_NAMES.get(method, method)


def metric_name(metric: str) -> str:
    """What a metric is called in print."""
    return metrics.metric(metric).label


def capitalized(name: str) -> str:
    """The first letter large, the others as they are; "mIoU" stays what it is."""
    word = name.split()[0]
    return name if word != word.lower() else name[0].upper() + name[1:]


def varied_keys(runs: pd.DataFrame) -> list[str]:
    """The `varied.*` columns, beside method and seed, that have more than one value in `runs`."""
    keys = [str(column) for column in runs if str(column).startswith("varied.") and column not in _NOT_A_CASE]
    return [key for key in keys if runs[key].nunique(dropna=False) > 1]


def value_text(value: Any) -> str:
    """A varied value as a person writes it."""
    if is_number(value):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_number(value: Any) -> bool:
    """Whether a varied value has a place on a number line (NaN, true and false have none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def metric_of(runs: pd.DataFrame) -> str:
    """The one metric that the compared of `runs` report first. ValueError when they report different ones."""
    return _only(runs, "headline")


def choice_of(runs: pd.DataFrame) -> str:
    """The one metric that chose the weights of the compared `runs`. ValueError when there are several."""
    return _only(runs, "metric")


def others_of(runs: pd.DataFrame) -> list[str]:
    """What the runs report beside `metric_of`, in their order."""
    named = [name for reported in runs["reported"] for name in reported.split()[1:]]
    return list(dict.fromkeys(named))


def _only(runs: pd.DataFrame, column: str) -> str:
    found = sorted(runs.loc[runs["compared"], column].dropna().unique())
    if len(found) > 1:
        raise ValueError(
            f"the runs report different metrics ({', '.join(found)}), expected one; "
            "give the folders of one task at a time"
        )
    return found[0] if found else "score"


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Column → the last part of its key, or the whole key where two end alike; "engine" of "engine.name"."""
    last = [key.removesuffix(".name").rsplit(".", 1)[-1] for key in keys]
    return {
        key: name if last.count(name) == 1 else key.removeprefix("varied.")
        for key, name in zip(keys, last, strict=True)
    }


def _part(name: str, value: Any) -> str:
    """A case and a config file are named by their value alone: a person chose it to be a name."""
    return str(value) if name in ("case", "config") else f"{name}={value_text(value)}"


def _rank(method: str) -> int:
    names = list(METHOD_NAMES)
    return names.index(method) if method in names else len(names)


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Absent first, then numbers by size, then words."""
    if is_number(value):
        return (1, float(value), "")
    return (0, 0.0, "") if pd.isna(value) else (2, 0.0, str(value))
