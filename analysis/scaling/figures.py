"""Figures of memory_scaling: peak memory against parameters, and savings beside the published ones."""

import math
from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.drawing import FOREGROUND, WIDTH_INCHES, Picture, Style, color_of, styles_of, text_color
from analysis.groups import method_name
from analysis.load import Row, rows_of
from analysis.scaling.cases import has_peak, listed, memory_text, params_text, short_model
from analysis.scaling.log_axis import plain_ticks
from analysis.tables import number

MOST_PANELS = 6
_MOST_MODELS = 20  # in the figure of savings, the largest
_MOST_TOLD = 40  # points in a figure's words
_HEIGHT_INCHES = 2.1
_MIB_PER_GIB = 1024
_SIZE_RATIO = 1.2  # of two sizes of model
_MOST_MISSING = 3  # panels not drawn that are named
_TELL = (
    "precision",
    "activation_checkpointing",
    "gradient_accumulation",
    "image_size",
    "frozen_dtype",
    "fused_attention",
    "task",
    "dataset",
)
_SAID = {
    "activation_checkpointing": "checkpointing",
    "fused_attention": "fused attention",
    "gradient_accumulation": "accumulation",
    "image_size": "pixels",
}


def memory_against_parameters(cases: pd.DataFrame) -> Picture | None:
    """A panel per engine, ranks and batch, a line per method; None where no two sizes have a peak."""
    rows = has_peak(cases).dropna(subset=["num_total_params"])
    if rows.empty:
        return None
    rows = rows.sort_values(["world_size", "engine", "batch_size"], kind="stable")
    rows = rows.assign(panel=_panel_names(rows))
    if not _several_sizes(rows):
        return None
    panels = most_telling(rows, "model")
    missing = not_drawn(rows, panels)
    rows, unit = in_unit(rows.loc[rows["panel"].isin(panels)])
    styles = styles_of(cases)
    extent = rows["num_total_params"].min(), rows["num_total_params"].max()

    def draw() -> Figure:
        figure, grid = panel_grid(len(panels), list(rows["label"].unique()), note=missing)
        for axes, name in zip(grid, panels, strict=True):
            of_panel = rows.loc[rows["panel"] == name]
            draw_series(axes, of_panel, "num_total_params", styles)
            axes.set_title(fill(name, 38), fontsize=7)
            axes.set_xscale("log")
            axes.set_xlim(extent[0] / 1.6, extent[1] * 1.6)
            plain_ticks(axes.xaxis, *extent, text=params_text, are_wide=True)
            axes.set_xlabel("Parameters of the model")
            log_memory(axes, of_panel, unit)
        legend(figure, rows, styles)
        return figure

    told = [f"{name}: {', '.join(points_told(rows.loc[rows['panel'] == name]))}" for name in panels]
    alt = f"Peak memory of a training step against the model's parameters, both logarithmic. {'. '.join(told)}."
    return Picture("memory-parameters", "Peak memory against parameters", f"{alt} {missing}".rstrip(), draw)


def savings_by_model(table: pd.DataFrame) -> Picture | None:
    """A panel per method compared to, models by size, the published savings beside; None without savings."""
    if table.empty:
        return None
    bases = [base for base in ("gps", "lora", "full") if (table["base_method"] == base).any()]
    sizes = table.groupby("model", sort=False)["num_total_params"].agg("median").to_dict()
    models = sorted(sizes, key=lambda model: sizes[model])[-_MOST_MODELS:]
    table = table.loc[table["model"].isin(models)]
    styles, labels = styles_of(table), list(table["label"].unique())

    def draw() -> Figure:
        height = 1.4 + 0.26 * len(models) + legend_inches(labels)
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        panels = figure.subplots(1, len(bases), sharey=True, squeeze=False)[0]
        for axes, base in zip(panels, bases, strict=True):
            _draw_savings(axes, table.loc[table["base_method"] == base], models, styles)
            axes.set_title(f"against\n{method_name(base)}")
            axes.set_xlabel("Saving (%)")
        panels[0].set_yticks(
            range(len(models)), [f"{short_model(model)}\n{params_text(sizes[model])}" for model in models]
        )
        panels[0].tick_params(axis="y", labelsize=6.5)
        published = [("published", Line2D([], [], color=text_color(), marker="|", markersize=10, linewidth=0))]
        legend(figure, table, styles, more=published if table["published_percent"].notna().any() else [])
        return figure

    told = [_saving_told(row) for row in rows_of(table.head(_MOST_TOLD))]
    alt = f"Savings of peak memory in percent, negative where more is needed: {'; '.join(told)}."
    return Picture("memory-savings", "Memory saved, beside the published", alt, draw)


def _saving_told(row: Row) -> str:
    saving = f"{number(row['saving_percent'], digits=1)} %{' predicted' if row['predicted'] else ''}"
    return f"{row['label']} against {row['base_label']} on {row['model']} {saving}"


def settings_told(rows: pd.DataFrame) -> list[str]:
    """Of each row the settings that are known to differ in `rows`: ", precision bf16, checkpointing True"."""
    told = [name for name in _TELL if name in rows and rows[name].nunique() > 1]
    return [
        "".join(f", {_SAID.get(name, name)} {row[name]}" for name in told if not pd.isna(row[name]))
        for row in rows_of(rows)
    ]


def _several_sizes(rows: pd.DataFrame) -> bool:
    """Whether the models differ in size; what adapters add to one of them is no other size."""
    sizes = rows.groupby("model")["num_total_params"].median()
    return bool(sizes.max() > _SIZE_RATIO * sizes.min())


def _panel_names(rows: pd.DataFrame) -> list[str]:
    names = []
    for row, told in zip(rows_of(rows), settings_told(rows), strict=True):
        ranks = "1 rank" if row["world_size"] == 1 else f"{row['world_size']} ranks"
        names.append(f"{row['engine']}, {ranks}, batch {row['batch_size']}{told}")
    return names


def most_telling(rows: pd.DataFrame, x: str) -> list[str]:
    """The panels to draw: measured ones first, then those with the most different x; in the order of `rows`."""
    places = {
        str(name): (bool(group["predicted"].all()), -group[x].nunique())
        for name, group in rows.groupby("panel", sort=False)
    }
    kept = sorted(places, key=lambda name: places[name])[:MOST_PANELS]
    return [name for name in places if name in kept]


def not_drawn(rows: pd.DataFrame, panels: Sequence[str]) -> str:
    """Which panels of `rows` a figure of these `panels` has no room for; empty where it shows all."""
    names = [str(name).replace("\n", ", ") for name in rows["panel"].unique() if name not in panels]
    return f"In the table only: {listed(names, most=_MOST_MISSING)}." if names else ""


def panel_grid(count: int, labels: Sequence[str], *, note: str = "") -> tuple[Figure, list[Axes]]:
    """Panels in two columns, one panel as wide as the figure, below a note and above a legend of these labels."""
    columns = min(count, 2)
    lines = -(-count // columns)
    height = _HEIGHT_INCHES * (lines if count > 1 else 1.3) + legend_inches(labels)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    if note:
        figure.suptitle(fill(note, 100), fontsize=6.5)
    grid = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for axes in grid[count:]:
        axes.axis("off")
    return figure, grid[:count]


def legend_inches(labels: Sequence[str]) -> float:
    """The height of `legend`, with the entries that it adds."""
    return 0.25 + 0.17 * math.ceil((len(labels) + 3) / _legend_columns(labels))


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max(len(label) for label in labels)
    return 3 if longest <= 20 else 2 if longest <= 36 else 1


def draw_series(
    axes: Axes,
    rows: pd.DataFrame,
    x: str,
    styles: Mapping[str, Style],
    *,
    y: str = "peak",
    line: str = "label",
) -> None:
    """A line per value of `line`, coloured by label.

    Measured filled and solid, predicted hollow and dashed, out of memory with a cross.
    """
    for _, group in rows.groupby([line, "predicted"], sort=False):
        group = group.sort_values(x, kind="stable")
        style, predicted = styles[str(group["label"].iloc[0])], bool(group["predicted"].iloc[0])
        color = color_of(style)
        axes.plot(
            group[x],
            group[y],
            color=color,
            marker=style.marker,
            markersize=4.5,
            markerfacecolor="none" if predicted else color,
            linestyle=(0, (3, 2)) if predicted else "-",
            linewidth=1.1,
        )
        beyond = group.loc[group["status"] == "oom"]
        axes.plot(beyond[x], beyond[y], color=text_color(), marker="x", markersize=6, linestyle="none")


def in_unit(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """`rows` with a column `peak`, and its unit: GiB, or MiB where no peak reaches one."""
    if rows["peak_mib"].max() < _MIB_PER_GIB:
        return rows.assign(peak=rows["peak_mib"]), "MiB"
    return rows.assign(peak=rows["peak_mib"] / _MIB_PER_GIB), "GiB"


def log_memory(axes: Axes, rows: pd.DataFrame, unit: str) -> None:
    """The y axis; rows: with `in_unit`'s column."""
    low, high = rows["peak"].min(), rows["peak"].max()
    axes.set_yscale("log")
    axes.set_ylim(low / 1.4, high * 1.4)
    plain_ticks(axes.yaxis, low, high)
    axes.set_ylabel(f"Peak per rank ({unit})")


def legend(
    figure: Figure,
    rows: pd.DataFrame,
    styles: Mapping[str, Style],
    *,
    more: Sequence[tuple[str, Line2D]] = (),
) -> None:
    """The labels, what filled and hollow mean, and what cannot be told from the markers."""
    entries: list[tuple[str, Line2D]] = []
    for label in rows["label"].unique():
        style = styles[str(label)]
        entries.append((str(label), Line2D([], [], color=color_of(style), marker=style.marker, markersize=4.5)))
    grey = color_of(Style(FOREGROUND, "o"))
    if rows["predicted"].any():
        hollow = Line2D(
            [], [], color=grey, marker="o", markerfacecolor="none", linestyle=(0, (3, 2)), markersize=4.5
        )
        entries.append(("predicted", hollow))
    if not rows["predicted"].all():
        entries.append(("measured", Line2D([], [], color=grey, marker="o", markersize=4.5)))
    if (rows["status"] == "oom").any():
        entries.append(("out of memory", Line2D([], [], color=grey, marker="x", linestyle="none")))
    entries += more
    figure.legend(
        [line for _, line in entries],
        [text for text, _ in entries],
        loc="outside lower center",
        ncols=_legend_columns([text for text, _ in entries]),
    )


def points_told(rows: pd.DataFrame) -> list[str]:
    """The cases in words."""
    return [
        f"{row['label']} {row['model']} {memory_text(row['peak_mib'])}{' predicted' if row['predicted'] else ''}"
        for row in rows_of(rows.head(_MOST_TOLD))
    ]


def _draw_savings(axes: Axes, table: pd.DataFrame, models: Sequence[str], styles: Mapping[str, Style]) -> None:
    rng = np.linspace(-0.25, 0.25, max(2, table["label"].nunique()))
    offsets = dict(zip(table["label"].unique(), rng, strict=False))
    axes.axvline(0, color=text_color(), linewidth=0.8)
    for row in rows_of(table):
        color = color_of(styles[row["label"]])
        place = models.index(row["model"]) + offsets[row["label"]]
        axes.plot(
            row["saving_percent"],
            place,
            color=color,
            marker=styles[row["label"]].marker,
            markerfacecolor="none" if row["predicted"] else color,
            markersize=4.5,
        )
        if not pd.isna(row["published_percent"]):
            axes.plot(
                row["published_percent"],
                models.index(row["model"]),
                color=text_color(),
                marker="|",
                markersize=12,
            )
    axes.set_ylim(-0.6, len(models) - 0.4)
