"""Figures of memory_scaling over the number of ranks: images per second, memory per rank, communication."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.drawing import WIDTH_INCHES, Picture, styles_of, text_color
from analysis.load import Row, rows_of
from analysis.scaling.cases import differing, short_model
from analysis.scaling.figures import (
    draw_series,
    in_unit,
    legend,
    log_memory,
    most_telling,
    not_drawn,
    panel_grid,
    points_told,
    settings_told,
)
from analysis.scaling.log_axis import every_value, plain_ticks
from analysis.scaling.ranks import NEITHER, STRONG
from analysis.scaling.traffic import mib_text, operations_of
from analysis.tables import number

_MOST_BARS = 24
_OPERATION_COLORS = {
    "all_reduce": "#4477AA",
    "reduce_scatter": "#EE6677",
    "all_gather": "#CCBB44",
    "broadcast": "#66CCEE",
    "reduce": "#AA3377",
    "all_to_all": "#228833",
    "gather": "#AAAAAA",
    "scatter": "#666666",
}


def speed_against_ranks(table: pd.DataFrame) -> Picture | None:
    """Images per second of every strong and weak series beside the ideal; table: `rank_scaling`'s."""
    rows = _series(table, "images_per_s")
    if rows.empty:
        return None
    panels, styles = most_telling(rows, "world_size"), styles_of(table)
    missing = not_drawn(rows, panels)
    rows = rows.loc[rows["panel"].isin(panels)]

    def draw() -> Figure:
        figure, grid = panel_grid(len(panels), list(rows["label"].unique()), note=missing)
        for axes, name in zip(grid, panels, strict=True):
            of_panel = rows.loc[rows["panel"] == name]
            draw_series(axes, of_panel, "world_size", styles, y="images_per_s", line="series_key")
            for _, series in of_panel.groupby("series_key", sort=False):
                ranks = sorted(series["world_size"])
                first = series["images_per_s"].iloc[0]
                ideal = [first * count / ranks[0] for count in ranks]
                axes.plot(ranks, ideal, color=text_color(), linewidth=0.8, linestyle=(0, (1, 2)))
            axes.set_title("\n".join(fill(line, 38) for line in name.split("\n")), fontsize=7)
            _ranks_axis(axes, of_panel)
            axes.set_yscale("log")
            plain_ticks(axes.yaxis, of_panel["images_per_s"].min(), of_panel["images_per_s"].max())
            axes.set_ylabel("Images/s")
        legend(figure, rows, styles)
        return figure

    told = [
        f"{_flat(row['panel'])}: {row['label']} on {row['world_size']} ranks "
        f"{number(row['images_per_s'], digits=1)} images/s ({number(row['efficiency_percent'], digits=0)} %)"
        for row in rows_of(rows)
    ]
    alt = f"Images per second against the number of ranks, dotted what would be ideal: {'; '.join(told)}."
    return Picture("scaling-speed", "Strong and weak scaling", f"{alt} {missing}".rstrip(), draw)


def memory_against_ranks(table: pd.DataFrame) -> Picture | None:
    """Peak memory of the fullest rank in every strong and weak series; table: `rank_scaling`'s."""
    rows = _series(table, "peak_mib")
    if rows.empty:
        return None
    panels, styles = most_telling(rows, "world_size"), styles_of(table)
    missing = not_drawn(rows, panels)
    rows, unit = in_unit(rows.loc[rows["panel"].isin(panels)])

    def draw() -> Figure:
        figure, grid = panel_grid(len(panels), list(rows["label"].unique()), note=missing)
        for axes, name in zip(grid, panels, strict=True):
            of_panel = rows.loc[rows["panel"] == name]
            draw_series(axes, of_panel, "world_size", styles, line="series_key")
            axes.set_title("\n".join(fill(line, 38) for line in name.split("\n")), fontsize=7)
            _ranks_axis(axes, of_panel)
            log_memory(axes, of_panel, unit)
        legend(figure, rows, styles)
        return figure

    told = [f"{_flat(name)}: {', '.join(points_told(rows.loc[rows['panel'] == name]))}" for name in panels]
    alt = f"Peak memory per rank against the number of ranks, both logarithmic. {'. '.join(told)}."
    return Picture("memory-ranks", "Memory per rank against ranks", f"{alt} {missing}".rstrip(), draw)


def communication_bars(table: pd.DataFrame) -> Picture | None:
    """Payload of a step by operation, a bar per case, beside it what a rank sends; table: `traffic`'s."""
    if table.empty:
        return None
    operations = operations_of(table)
    rows = table.head(_MOST_BARS)
    told_apart = differing(rows, ("batch_size", "model"))
    names = [_bar_name(row, told_apart) for row in rows_of(rows)]

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH_INCHES, 1.1 + 0.24 * len(rows)), layout="constrained")
        axes = figure.subplots()
        _draw_payload(axes, rows, operations)
        axes.set_yticks(range(len(rows)), names, fontsize=7)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Payload of a step (MiB)\nbeside: what a rank sends (MiB)")
        figure.legend(loc="outside upper center", ncols=4, handlelength=1)
        return figure

    told = [f"{name} {mib_text(row['wire_mib'])} MiB" for name, row in zip(names, rows_of(rows), strict=True)]
    more = f" {len(table) - len(rows)} cases are in the table only." if len(table) > len(rows) else ""
    alt = (
        f"Stacked bars of what a step's collectives carry, by operation; sent by a rank: {'; '.join(told)}.{more}"
    )
    return Picture("communication", "Communication of a step", alt, draw)


def _bar_name(row: Row, told_apart: Sequence[str]) -> str:
    name = f"{row['label']}, {row['engine']}, {row['world_size']} ranks"
    name += f", batch {row['batch_size']}" if "batch_size" in told_apart else ""
    return name + (f"\n{short_model(row['model'])}" if "model" in told_apart else "")


def _draw_payload(axes: Axes, rows: pd.DataFrame, operations: Sequence[str]) -> None:
    places = np.arange(len(rows))
    starts = np.zeros(len(rows))
    for name in operations:
        widths = rows[f"{name}_mib"].fillna(0).to_numpy(dtype=float)
        color = _OPERATION_COLORS.get(name, text_color())
        axes.barh(places, widths, left=starts, height=0.68, color=color, label=name.replace("_", "-"))
        starts += widths
    for end, place, wire in zip(starts, places, rows["wire_mib"], strict=True):
        text = mib_text(wire)
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=7)


def _series(table: pd.DataFrame, figure: str) -> pd.DataFrame:
    """The rows of strong and weak series with that figure, and the panel that each belongs to."""
    if table.empty:
        return table
    rows = table.loc[table["series"] != NEITHER].dropna(subset=[figure])
    panels = []
    for row, told in zip(rows_of(rows), settings_told(rows), strict=True):
        equal = f"batch {row['batch_size']}" if row["series"] == STRONG else f"{row['per_rank']:g} per rank"
        panels.append(f"{short_model(row['model'])}\n{row['kept']}, {row['series']} ({equal}){told}")
    return rows.assign(panel=panels)


def _flat(panel: str) -> str:
    return panel.replace("\n", ", ")


def _ranks_axis(axes: Axes, rows: pd.DataFrame) -> None:
    axes.set_xscale("log", base=2)
    every_value(axes.xaxis, sorted(rows["world_size"].unique()))
    axes.set_xlabel("Ranks")
