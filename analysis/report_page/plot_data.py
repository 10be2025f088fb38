"""What the script of a report plots and filters by: every run in short, as JSON."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.drawing import CATEGORY_COLORS, FOREGROUND, Style, styles_of
from analysis.groups import (
    capitalized,
    choice_of,
    is_number,
    method_name,
    metric_name,
    metric_of,
    others_of,
    value_text,
    varied_keys,
    with_labels,
)
from analysis.load import Row, rows_of
from analysis.tables import filled, source

_MOST_SERIES = 12  # that a person can tell apart; of more labels, the methods are the series
_MOST_POINTS = 200  # of one run's curve
_MOST_OPTIONS = 60
_FACETS = ("method", "status", "model", "engine", "predicted", "dataset", "precision", "world_size", "batch_size")
_CAUSES = ("num_total_params", "world_size", "batch_size", "num_trainable_params")  # of memory
# What only some runs measure: an axis of the plot, and a column of the table, where any has a value.
_FURTHER = {
    "allocated_mib": "Allocated (MiB)",
    "reserved_mib": "Reserved (MiB)",
    "nvml_used_mib": "Used by NVML (MiB)",
    "mfu": "MFU",
    "hfu": "HFU",
    "data_wait_percent": "Data wait (%)",
}
_OF_RANKS = {"rank_peak_min_mib": "Least rank (MiB)", "rank_peak_max_mib": "Fullest rank (MiB)"}
_SCORES = ("score", "validation_score")
_HEADINGS = {"predicted": "Source", "world_size": "Ranks", "batch_size": "Batch"}


def facets_of(runs: pd.DataFrame) -> dict[str, tuple[str, pd.Series]]:
    """What a filter can choose by: column → (heading, its value as text for each run); several values each."""
    found = {}
    for key in (*_FACETS, *further_keys(runs, _FACETS)):
        texts = runs[key].map(lambda value, key=key: _facet_text(key, value))
        is_new = not any(texts.equals(other) for _, other in found.values())
        if 2 <= texts.nunique() <= _MOST_OPTIONS and is_new:
            heading = key.removeprefix("varied.")
            found[key] = (_HEADINGS.get(key, heading if heading != key else capitalized(key)), texts)
    return found


def further_keys(runs: pd.DataFrame, known: Collection[str]) -> list[str]:
    """The varied keys that are not the setting of a known column once more, as varied.engine.name is engine."""
    return [key for key in varied_keys(runs) if key.removeprefix("varied.").removesuffix(".name") not in known]


def further_figures(runs: pd.DataFrame) -> dict[str, str]:
    """Column → heading of what only some runs measure, where any did; of ranks where a run has several."""
    names = _FURTHER | (_OF_RANKS if (runs["world_size"] > 1).any() else {})
    return {key: name for key, name in names.items() if key in runs and runs[key].notna().any()}


def colors_of(data: Mapping[str, Any]) -> dict[str, str]:
    """Label → the colour of its series; `data`: of `plot_data`."""
    drawn = [run for run in data["runs"] if run["series"] is not None]
    return {run["label"]: data["series"][run["series"]]["color"] for run in drawn}


def plot_data(runs: pd.DataFrame, curves: pd.DataFrame, styles: Mapping[str, Style]) -> dict[str, Any]:
    """The content of the page's JSON; a run's place in "runs" is its row's place in the table of runs.

    styles: those of the labels in the other figures. A run beside the comparison has no series and no values: it
    is not drawn, and its metric may be another one.
    "axes" are the fields of the first scatter plot, in x and in y; "scores" those never on a logarithmic axis.
    """
    fields, categories = _fields(runs), filled(runs)
    labelled = with_labels(runs.loc[runs["compared"]])
    labels = labelled["label"].reindex(runs.index)
    order = {label: place for place, label in enumerate(labelled["label"].unique())}
    series_of_runs, series = _series(runs, labelled, styles)
    facets = {key: texts.to_list() for key, (_, texts) in facets_of(runs).items()}
    lines = {str(folder): _thinned(group) for folder, group in curves.groupby("folder")}
    short = []
    for place, (run, label) in enumerate(zip(rows_of(runs), labels, strict=True)):
        about = {
            "name": run["name"],
            "label": label if run["compared"] else run["name"],
            "status": run["status"],
            "predicted": bool(run["predicted"]),
            "seed": run["seed"],
            "series": series_of_runs[place],
            "facets": {key: texts[place] for key, texts in facets.items()},
        }
        figures = _figures(run, list(fields), [key for _, key in categories], lines) if run["compared"] else {}
        short.append(about | {"order": order.get(label)} | figures)
    splits = " and ".join(sorted(curves["split"].unique()))
    return {
        "fields": list(fields.values()),
        "axes": _axes(runs, list(fields)),
        "scores": [place for place, key in enumerate(fields) if key in _SCORES or key.startswith("test_")],
        "categories": [{"name": name, "color": CATEGORY_COLORS[name]} for name, _ in categories],
        "curve": f"{capitalized(metric_name(choice_of(runs)))} on {splits}",
        "series": series,
        "runs": short,
    }


def _figures(
    run: Row, fields: Sequence[str], categories: Sequence[str], lines: Mapping[str, list[tuple[int, float]]]
) -> dict[str, Any]:
    """What is drawn of a run; its memory is None where its total or all of its parts are not known."""
    memory = [run[key] for key in categories]
    is_known = not math.isnan(run["peak_total_mib"]) and not all(map(math.isnan, memory))
    return {
        "values": [_rounded(run[key]) for key in fields],
        "memory": [_rounded(value) or 0 for value in memory] if is_known else None,
        "peak": _rounded(run["peak_total_mib"]),
        "curve": lines.get(run["folder"], []),
    }


def plot_kinds(data: Mapping[str, Any]) -> list[str]:
    """Which plots there are data for: "scatter", "bars", "curves"."""
    runs = [run for run in data["runs"] if run["series"] is not None]
    has = {
        "scatter": any(sum(value is not None for value in run["values"]) > 1 for run in runs),
        "curves": any(run["curve"] for run in runs),
        "bars": any(run["memory"] for run in runs),
    }
    return [kind for kind, is_there in has.items() if is_there]


def _fields(runs: pd.DataFrame) -> dict[str, str]:
    """Column → name of the axes to choose from: the known figures with a value, and the varied numbers."""
    names = {
        "peak_total_mib": "Peak memory of a training step (MiB)",
        "score": f"{capitalized(metric_name(metric_of(runs)))} on test",
        "validation_score": f"{capitalized(metric_name(choice_of(runs)))} on validation",
        **{f"test_{name}": f"{capitalized(metric_name(name))} on test" for name in others_of(runs)},
        "images_per_s": "Images/s",
        "num_total_params": "Parameters",
        "num_trainable_params": "Trained parameters",
        "trainable_percent": "Trained %",
        "adapter_kib": "Adapter (KiB)",
        "seconds_total": "Seconds",
        "world_size": "Ranks",
        "batch_size": "Batch size",
        **further_figures(runs),
    }
    names |= {key: key.removeprefix("varied.") for key in varied_keys(runs) if _is_numeric(runs[key])}
    always = ("peak_total_mib", "score")
    return {
        key: name
        for key, name in names.items()
        if key in runs and runs[key].nunique() > (0 if key in always else 1)
    }


def _axes(runs: pd.DataFrame, keys: Sequence[str]) -> list[int]:
    """Score against memory; where nothing has a score, memory against what makes it."""
    if runs["score"].notna().any():
        wanted = ("peak_total_mib", "score")
    else:
        causes = [key for key in _CAUSES if key in keys]
        wanted = (causes[0] if causes else "peak_total_mib", "peak_total_mib")
    return [keys.index(key) if key in keys else 0 for key in wanted]


def _series(
    runs: pd.DataFrame, labelled: pd.DataFrame, styles: Mapping[str, Style]
) -> tuple[list[int | None], list[dict[str, str]]]:
    """Each run's series, and the series in the order of all figures with what they look like."""
    if labelled["label"].nunique() > _MOST_SERIES:
        labelled = labelled.assign(label=labelled["method"].map(method_name))
        styles = styles_of(labelled)
    labels, names = labelled["label"].reindex(runs.index), list(labelled["label"].unique())
    looks = [
        {
            "name": name,
            "color": "currentColor" if style.color == FOREGROUND else style.color,
            "marker": style.marker,
        }
        for name, style in ((name, styles[name]) for name in names)
    ]
    return [names.index(label) if isinstance(label, str) else None for label in labels], looks


def _thinned(curve: pd.DataFrame) -> list[tuple[int, float]]:
    """The evaluations of one run, every n-th where they are many; the last one always."""
    rounded = [(step, _rounded(value)) for step, value in zip(curve["step"], curve["value"], strict=True)]
    points = [(step, value) for step, value in rounded if value is not None]
    every = math.ceil(len(points) / _MOST_POINTS)
    return points[::-every][::-1] if every else []


def _facet_text(key: str, value: Any) -> str:
    if key == "predicted":
        return source(value)
    if key == "method":
        return method_name(value)
    return "–" if pd.isna(value) else value_text(value)


def _is_numeric(values: pd.Series) -> bool:
    return bool(values.dropna().map(is_number).all())


def _rounded(value: Any) -> float | None:
    """Six digits are more than a plot shows; None for what has no place in it."""
    return float(f"{value:.6g}") if is_number(value) and math.isfinite(value) else None
