"""SNELLA's budget of non-zeros over layers and time, as steps.jsonl has it: a heat map and a table."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.drawing import WIDTH_INCHES, Picture
from analysis.groups import with_labels
from analysis.load import rows_of
from analysis.tables import number
from analysis.updates.layers import block_of, kind_of, stage_of
from snell_scale.records import read_steps

_KEY = "sparsity/"
_MOST_RUNS = 3  # one heat map below the other
_MOST_NAMED = 30  # matrices that are named one by one; of more, the stages are
_ROW_INCHES, _MOST_INCHES = 0.13, 4.2  # of a heat map
_NAME_INCHES = 0.12  # that two names are apart at least
_SHARES = (0, 0.01, 0.1, 0.25, 0.5, 1)


def allocations(runs: pd.DataFrame) -> pd.DataFrame:
    """The share of non-zeros of every matrix at every recorded allocation, of the first seed of each label.

    Columns: label, folder, step (the one that it held from), layer, index (of the matrix in the layer), matrix
    (in words), block (None outside of the numbered blocks), nonzero_percent. In the order of the model's layers.
    """
    lines = []
    first = with_labels(runs.loc[runs["compared"]]).drop_duplicates("label")
    for run in rows_of(first.loc[first["method"] == "snella"]):
        for line in read_steps(Path(run["folder"])):
            shares = {key.removeprefix(_KEY): value for key, value in line.items() if key.startswith(_KEY)}
            about = {"label": run["label"], "folder": run["folder"], "step": line["step"]}
            lines += [about | _matrix(name, list(shares)) | _share(value) for name, value in shares.items()]
    columns = ["label", "folder", "step", "layer", "index", "matrix", "block", "nonzero_percent"]
    return pd.DataFrame(lines, columns=columns)


def write_allocations(table: pd.DataFrame, output: Path, *, name: str) -> list[Path]:
    """Write <name>.csv; nothing where there are no allocations."""
    if table.empty:
        return []
    path = output / f"{name}.csv"
    path.write_text(table.to_csv(index=False, lineterminator="\n"), encoding="utf-8")
    return [path]


def allocation_heat_map(runs: pd.DataFrame) -> Picture | None:
    """Matrices in the model's order against training steps; None where no run recorded an allocation."""
    return allocation_picture(allocations(runs))


def allocation_picture(table: pd.DataFrame, *, name: str = "allocation") -> Picture | None:
    """`allocation_heat_map` of allocations that are there already."""
    labels = list(table["label"].unique())
    if not labels:
        return None
    grids = {label: _grid(table.loc[table["label"] == label]) for label in labels[:_MOST_RUNS]}

    def draw() -> Figure:
        heights = [0.5 + _grid_inches(grid) for grid in grids.values()]
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.9), layout="constrained")
        panels = figure.subplots(len(grids), squeeze=False, height_ratios=heights).flatten()
        meshes = [_draw_grid(axes, grid) for axes, grid in zip(panels, grids.values(), strict=True)]
        for axes, label in zip(panels, grids, strict=True):
            if len(labels) > 1:
                axes.set_title(label)
        bar = figure.colorbar(meshes[0], ax=list(panels), location="bottom", aspect=40, ticks=_SHARES)
        bar.set_ticklabels([f"{100 * share:g} %" for share in _SHARES])
        bar.set_label("Non-zero entries of the update")
        return figure

    shown = f" The first {_MOST_RUNS} of {len(labels)} runs are shown." if len(labels) > _MOST_RUNS else ""
    told = "; ".join(f"{label} {_told(grid)}" for label, grid in grids.items())
    alt = f"Heat map of the share of non-zeros of every adapted matrix over training: {told}.{shown}"
    return Picture(name, "SNELLA's allocation over layers and time", alt, draw)


def _matrix(name: str, names: list[str]) -> dict[str, object]:
    layer, _, index = name.rpartition("/")
    count = sum(other.rpartition("/")[0] == layer for other in names)
    block, kind = block_of(layer), kind_of(layer, int(index), count)
    words = kind if block is None else f"{block.rpartition('.')[2]} {kind}"
    return {"layer": layer, "index": int(index), "matrix": words, "block": block}


def _share(sparsity: float) -> dict[str, float]:
    return {"nonzero_percent": 100 * (1 - sparsity)}


def _grid(table: pd.DataFrame) -> pd.DataFrame:
    """Matrices, in the model's order, by step."""
    rows = table.drop_duplicates(["layer", "index"])[["layer", "index"]]
    grid = table.pivot(index=["layer", "index"], columns="step", values="nonzero_percent")
    grid = grid.loc[list(rows.itertuples(index=False, name=None))] / 100
    words = table.drop_duplicates(["layer", "index"])
    return grid.set_axis(pd.MultiIndex.from_arrays([words["layer"].map(stage_of), words["matrix"]]), axis=0)


def _grid_inches(grid: pd.DataFrame) -> float:
    return min(_ROW_INCHES * len(grid), _MOST_INCHES)


def _draw_grid(axes: Axes, grid: pd.DataFrame) -> QuadMesh:
    steps = grid.columns.to_numpy(dtype=float)
    last = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    mesh = axes.pcolormesh(
        np.append(steps, last),
        np.arange(len(grid) + 1),
        grid.to_numpy(),
        cmap="viridis",
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        rasterized=True,  # thousands of cells: as vectors they would be megabytes
    )
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # one allocation is one step wide
    axes.set_xlabel("Optimizer step")
    names = [matrix for _, matrix in grid.index]
    if len(names) <= _MOST_NAMED:
        axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=6.5)
    else:
        rows = _named_rows(grid)
        axes.set_yticks(rows, [grid.index[row][0] for row in rows], fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    return mesh


def _named_rows(grid: pd.DataFrame) -> list[int]:
    """Where stages begin; of two whose names would overlap the one of more matrices."""
    stages = [stage for stage, _ in grid.index]
    starts = [row for row, stage in enumerate(stages) if row == 0 or stage != stages[row - 1]]
    sizes = np.diff([*starts, len(stages)])
    apart = _NAME_INCHES * len(stages) / _grid_inches(grid)
    named: list[int] = []
    for _, row in sorted(zip(-sizes, starts, strict=True)):
        if all(abs(row - other) >= apart for other in named):
            named.append(row)
    return sorted(named)


def _told(grid: pd.DataFrame) -> str:
    last = grid.iloc[:, -1]
    most, least = last.idxmax(), last.idxmin()
    first, end = grid.columns[0], grid.columns[-1]
    return (
        f"from step {first} to {end}; at the end {number(100 * last[most], digits=2)} % in {most[1]}, the most, "
        f"and {number(100 * last[least], digits=2)} % in {least[1]}, the least"
    )
