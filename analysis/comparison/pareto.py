"""Which rows of a comparison no other row beats in metric, memory and throughput at once, and their picture."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.drawing import WIDTH_INCHES, Picture, Style, color_of
from analysis.groups import capitalized, metric_name
from analysis.labels import Point, draw_key, key_inches, names_of_points, place_labels
from analysis.load import rows_of
from analysis.tables import mean_and_std, number, size
from snell_scale import metrics

_COST_AXES = {"peak_total_mib": "Peak memory of a training step (MiB)", "images_per_s": "Images per second"}


def objectives(table: pd.DataFrame, metric: str) -> dict[str, int]:
    """Column → 1 where more is better, -1 where less is, for what any row that ended ok has a value of."""
    signs = {"score_mean": 1 if metrics.metric(metric).higher_is_better else -1}
    signs |= {"peak_total_mib_mean": -1, "images_per_s_mean": 1}
    ok = table.loc[table["status"] == "ok"]
    return {column: sign for column, sign in signs.items() if ok[column].notna().any()}


def front(table: pd.DataFrame, signs: Mapping[str, int]) -> list[bool | None]:
    """Per row whether it is on the Pareto front; None for a row that did not end ok or lacks a value.

    A row is on the front unless another is at least as good in everything and better in something. By the means.
    """
    goods = [
        tuple(sign * row[column] for column, sign in signs.items()) if row["status"] == "ok" else None
        for row in rows_of(table)
    ]
    judged = [good for good in goods if good and all(value == value for value in good)]
    return [None if good not in judged else not any(_beats(other, good) for other in judged) for good in goods]


def pareto_picture(
    table: pd.DataFrame, metric: str, styles: Mapping[str, Style], *, name: str, title: str
) -> Picture | None:
    """The metric against memory and against throughput, intervals as bars; filled: on the front.

    None where no row that ended ok has the metric and one of the two.
    """
    ok = table.loc[(table["status"] == "ok") & table["score_mean"].notna()]
    axes_of = {key: text for key, text in _COST_AXES.items() if ok[f"{key}_mean"].notna().any()}
    if not axes_of:
        return None

    names = names_of_points(list(ok["label"]))

    def draw() -> Figure:
        height = 0.4 + 3.1 * len(axes_of) + key_inches(names)
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        figure.suptitle(title, fontsize=9)
        panels = figure.subplots(len(axes_of), 1, squeeze=False)[:, 0]
        points = [
            _panel(axes, ok.dropna(subset=[f"{key}_mean"]), key, styles, names)
            for axes, key in zip(panels, axes_of, strict=True)
        ]
        for axes, text in zip(panels, axes_of.values(), strict=True):
            axes.set_xlabel(text)
            axes.set_ylabel(f"{capitalized(metric_name(metric))}, mean and 95 % interval")
        draw_key(figure, names, {label: (color_of(styles[label]), styles[label].marker) for label in names})
        for axes, named in zip(panels, points, strict=True):
            place_labels(axes, named)
        return figure

    alt = f"Scatter plots of {metric_name(metric)} against {' and '.join(axes_of.values())}: {_told(ok)}."
    return Picture(name, title, alt, draw)


def _panel(
    axes: Axes, rows: pd.DataFrame, key: str, styles: Mapping[str, Style], names: Mapping[str, str]
) -> Sequence[Point]:
    points, ground = [], axes.get_facecolor()
    for row in rows_of(rows):
        style, color = styles[row["label"]], color_of(styles[row["label"]])
        x, error = row[f"{key}_mean"], _zero_if_nan(row["score_half"])
        axes.errorbar(
            x,
            row["score_mean"],
            yerr=error or None,
            color=color,
            marker=style.marker,
            markersize=7,
            markerfacecolor=color if row["front"] else ground,
            elinewidth=1.1,
            capsize=2.5,
        )
        points.append(Point(names[row["label"]], x, row["score_mean"], error, color))
    axes.margins(0.14, 0.12)
    return points


def _told(rows: pd.DataFrame) -> str:
    told = []
    for row in rows_of(rows):
        place = ", on the Pareto front" if row["front"] else ""
        memory, speed = size(row["peak_total_mib_mean"]), number(row["images_per_s_mean"], digits=0)
        told.append(
            f"{row['label']} {mean_and_std(row['score_mean'], row['score_half'])} at {memory} MiB "
            f"and {speed} images/s{place}"
        )
    return "; ".join(told)


def _zero_if_nan(value: float) -> float:
    return value if value == value else 0.0


def _beats(other: tuple[float, ...], good: tuple[float, ...]) -> bool:
    pairs = list(zip(other, good, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
