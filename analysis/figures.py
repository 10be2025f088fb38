"""The figures: accuracy against memory, memory by category, validation curves, and a study's line or bars."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from analysis.drawing import CATEGORY_COLORS, Picture, Style, color_of, method_style, new_figure, text_color
from analysis.groups import capitalized, is_number, metric_name, value_text
from analysis.labels import Point, draw_key, key_inches, names_of_points, on_two_lines, place_labels
from analysis.load import Row, rows_of
from analysis.tables import PEAKS, filled, mean_and_std, score, size

Styles = Mapping[str, Style]
_LEGEND_COLUMNS = 5  # of memory categories, in the width of a figure


def accuracy_against_memory(table: pd.DataFrame, metric: str, styles: Styles) -> Picture | None:
    """One marker per row of `comparison` that ended ok; None where no row has both figures."""
    rows = _ok(table, "score_mean", "peak_total_mib")
    if rows.empty:
        return None

    names = names_of_points(list(rows["label"]))

    def draw() -> Figure:
        figure, axes = new_figure(height_inches=3.6 + key_inches(names))
        points = []
        for row in rows_of(rows):
            color, error = color_of(styles[row["label"]]), _zero_if_nan(row["score_std"])
            axes.errorbar(
                row["peak_total_mib"],
                row["score_mean"],
                yerr=error or None,
                color=color,
                marker=styles[row["label"]].marker,
                markerfacecolor="none" if row["predicted"] else color,
                markersize=7,
                elinewidth=1.1,
                capsize=2.5,
            )
            points.append(Point(names[row["label"]], row["peak_total_mib"], row["score_mean"], error, color))
        axes.set_xlabel("Peak memory of a training step (MiB)")
        axes.set_ylabel(f"{_name(metric)} on test, mean ± std")
        axes.margins(0.14, 0.1)
        draw_key(figure, names, {label: (color_of(styles[label]), styles[label].marker) for label in names})
        place_labels(axes, points)
        return figure

    told = [f"{row['label']} {score(row)} at {size(row['peak_total_mib'])} MiB" for row in rows_of(rows)]
    alt = f"Scatter plot of {_name(metric)} on test against peak memory: {'; '.join(told)}."
    return Picture("accuracy-memory", f"{_name(metric)} against peak memory", alt, draw)


def memory_by_category(table: pd.DataFrame, *, name: str = "memory-categories") -> Picture | None:
    """One stacked bar per row of `comparison` with its peak's parts, whatever its status; hatched: predicted."""
    rows = table.dropna(subset=["peak_total_mib"]).dropna(subset=list(PEAKS), how="all")
    rows = rows.fillna(dict.fromkeys(PEAKS, 0.0))  # records of the first schema have fewer categories
    if rows.empty:
        return None
    labels, parts = [_with_state(row) for row in rows_of(rows)], filled(rows)

    told = []
    for label, row in zip(labels, rows_of(rows), strict=True):
        words = ", ".join(f"{category} {size(row[key])}" for category, key in parts)
        told.append(f"{label} {size(row['peak_total_mib'])} ({words})")
    alt = f"Stacked bars of peak memory in MiB by category: {'; '.join(told)}."
    return Picture(name, "Peak memory by category", alt, lambda: _stacked_bars(rows, labels, parts))


def _stacked_bars(rows: pd.DataFrame, labels: Sequence[str], parts: Sequence[tuple[str, str]]) -> Figure:
    """parts: each category with its column of `rows`."""
    figure, axes = new_figure(height_inches=0.9 + 0.3 * len(rows))
    positions, starts = np.arange(len(rows)), np.zeros(len(rows))
    hatches = ["////" if predicted else "" for predicted in rows["predicted"]]
    for category, key in parts:
        widths, bars = rows[key].to_numpy(dtype=float), {"height": 0.68, "linewidth": 0, "hatch": hatches}
        color, ground = CATEGORY_COLORS[category], axes.get_facecolor()  # a hatch has the colour of the edge
        axes.barh(positions, widths, left=starts, facecolor=color, edgecolor=ground, **bars)
        starts += widths
    axes.set_yticks(positions, [on_two_lines(label) for label in labels])
    for position, total in enumerate(rows["peak_total_mib"]):
        axes.annotate(
            size(total),
            (total, position),
            (4, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=8,
        )
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Peak memory of a training step (MiB)")
    handles = [Patch(color=CATEGORY_COLORS[category], label=category) for category, _ in parts]
    columns = len(parts) if len(parts) <= _LEGEND_COLUMNS else math.ceil(len(parts) / 2)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=1, columnspacing=1.2)
    return figure


def training_curves(curves: pd.DataFrame, metric: str, styles: Styles) -> Picture | None:
    """Evaluations during training, mean ± std over seeds. curves: columns label, split, step, value."""
    if curves.empty:
        return None
    split = " and ".join(sorted(curves["split"].unique()))
    labels = list(curves["label"].unique())

    def draw() -> Figure:
        figure, axes = new_figure(height_inches=3.9)
        for label in labels:
            by_step = curves[curves["label"] == label].groupby("step")["value"]
            mean, std = by_step.mean(), by_step.std(ddof=1).fillna(0)
            style = styles[label]
            color = color_of(style)
            every = max(1, len(mean) // 6)
            axes.plot(
                mean.index, mean, color=color, label=label, marker=style.marker, markersize=4.5, markevery=every
            )
            axes.fill_between(mean.index, mean - std, mean + std, color=color, alpha=0.12, linewidth=0)
        axes.set_xlabel("Optimizer step")
        axes.set_ylabel(f"{_name(metric)} on {split}")
        figure.legend(loc="outside lower center", ncols=3)
        return figure

    last = curves.sort_values("step").groupby(["label", "folder"], as_index=False)["value"].last()
    ends = rows_of(last.groupby("label")["value"].agg(["mean", "std"]).reset_index())
    told = [f"{row['label']} ends at {mean_and_std(row['mean'], row['std'])}" for row in ends]
    alt = f"Line plot of {_name(metric)} on {split} against the optimizer step: {'; '.join(told)}."
    return Picture("training-curves", f"{_name(metric)} on {split} during training", alt, draw)


def study_line(
    table: pd.DataFrame, metric: str, *, key: str, series: pd.Series, styles: Styles, name: str
) -> Picture | None:
    """Score against the number `key`, one line per value of `series` (aligned with `table`).

    Rows whose key is no number (null: without it) are drawn across as a dashed line at their score.
    """
    rows = _ok(table.assign(series=series), "score_mean")
    if rows.empty:
        return None
    short = key.rsplit(".", 1)[-1]

    def draw() -> Figure:
        figure, axes = new_figure(height_inches=3.5)
        for label, group in rows.groupby("series", sort=False):
            style = styles[str(label)]
            color = color_of(style)
            numeric = group.loc[group[key].map(is_number)].sort_values(key)
            x, mean = numeric[key].astype(float), numeric["score_mean"]
            std = numeric["score_std"].fillna(0)
            axes.plot(x, mean, color=color, marker=style.marker, markersize=5, label=label)
            axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)
            for _, row in group.loc[~group[key].map(is_number)].iterrows():
                text = label if pd.isna(row[key]) else f"{label}, {short}={value_text(row[key])}"
                axes.axhline(row["score_mean"], color=color, linestyle=(0, (5, 3)), linewidth=1.2, label=text)
        values = rows[key][rows[key].map(is_number)].astype(float)
        if values.min() > 0 and values.max() / values.min() >= 30:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(short)
        axes.set_ylabel(f"{_name(metric)} on test, mean ± std")
        if len(axes.get_lines()) > 1:
            figure.legend(loc="outside lower center", ncols=2)
        return figure

    alt = f"Line plot of {_name(metric)} on test against {short}: {_told(rows)}."
    return Picture(name, f"{_name(metric)} against {short}", alt, draw)


def study_bars(table: pd.DataFrame, metric: str, *, name: str) -> Picture | None:
    """One bar per row of `comparison` that ended ok, from zero, with its error bar and its figures."""
    rows = _ok(table, "score_mean")
    if rows.empty:
        return None

    def draw() -> Figure:
        figure, axes = new_figure(height_inches=0.8 + 0.34 * len(rows))
        for position, row in enumerate(rows_of(rows)):
            error = _zero_if_nan(row["score_std"])
            axes.barh(position, row["score_mean"], height=0.66, color=color_of(method_style(row["method"])))
            if error:
                axes.errorbar(row["score_mean"], position, xerr=error, color=text_color(), capsize=2.5)
            text = f"{score(row)}  (n={row['n']})"
            place = (row["score_mean"] + error, position)
            axes.annotate(text, place, (5, 0), textcoords="offset points", va="center_baseline", fontsize=8)
        axes.set_yticks(range(len(rows)), [on_two_lines(label) for label in rows["label"]])
        axes.invert_yaxis()
        axes.margins(x=0.28)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{_name(metric)} on test, mean ± std")
        return figure

    alt = f"Bars of {_name(metric)} on test: {_told(rows)}."
    return Picture(name, f"{_name(metric)} by case", alt, draw)


def _ok(table: pd.DataFrame, *needed: str) -> pd.DataFrame:
    return table.loc[table["status"] == "ok"].dropna(subset=list(needed))


def _told(rows: pd.DataFrame) -> str:
    return "; ".join(f"{r['label']} {score(r)}" for r in rows_of(rows))


def _with_state(row: Row) -> str:
    state = [*([row["status"]] if row["status"] != "ok" else []), *(["predicted"] if row["predicted"] else [])]
    return f"{row['label']} ({', '.join(state)})" if state else row["label"]


def _zero_if_nan(value: float) -> float:
    return 0.0 if pd.isna(value) else value


def _name(metric: str) -> str:
    return capitalized(metric_name(metric))
