"""How many directions an update uses: effective, stable and numerical rank of every ΔW, per layer and method.

effective: exp of the entropy of the singular values σ divided by their sum (Roy and Vetterli, EUSIPCO 2007).
stable: Σσ² / max σ². numerical: how many σ exceed max(out, in) · ε · max σ, with float32's ε.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.drawing import WIDTH_INCHES, Picture, Style, color_of, styles_of, text_color
from analysis.groups import with_labels
from analysis.load import Row, rows_of
from analysis.scaling.log_axis import plain_ticks
from analysis.tables import Column, number, write_tables
from analysis.updates.deltas import Delta, deltas
from analysis.updates.layers import block_of, kind_of, natural

MEASURES = {"effective_rank": "Effective rank", "stable_rank": "Stable rank", "numerical_rank": "Numerical rank"}
# Multiply-adds of all decompositions together: half a minute on one core. Beyond it, blocks are sampled evenly.
_MOST_WORK = 1e11
_MOST_ENTRIES = 2**24  # of one matrix: 128 MiB, several times while it is made
_MOST_LABELS_BESIDE = 9  # in the legend's corner
_EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class DeltaRanks:
    """One row per matrix of the first seed of each label, and what has to be said of them.

    table: label, method, folder, layer, index, block (None outside of the numbered blocks), kind, num_rows,
    num_columns, the MEASURES, nonzero_percent, norm (Frobenius).
    """

    table: pd.DataFrame
    notes: tuple[str, ...]


def delta_ranks(runs: pd.DataFrame) -> DeltaRanks:
    """The ranks of what the compared runs that ended ok learnt; notes name the runs without readable updates."""
    compared = with_labels(runs.loc[runs["compared"]])
    first = compared.loc[compared["status"] == "ok"].drop_duplicates("label")
    rows: list[Row] = []
    notes: list[str] = []
    for run in rows_of(first):
        try:
            found = deltas(Path(run["folder"]))
        except ValueError as error:
            notes.append(f"{run['label']} is left out: {error}.")
            continue
        chosen, left_out = _within(found, _MOST_WORK / len(first))
        notes += [f"{run['label']}: {text}." for text in left_out]
        about = {"label": run["label"], "method": run["method"], "folder": run["folder"]}
        counts = Counter(delta.layer for delta in found)
        rows += [about | _row(delta, counts[delta.layer]) for delta in chosen]
    table = pd.DataFrame(rows)
    return DeltaRanks(table, (*_meaning(table), *notes))


def rank_profile(runs: pd.DataFrame) -> Picture | None:
    """The three ranks over the model's depth, one line per label; None where no run's updates can be read."""
    return rank_picture(delta_ranks(runs), runs)


def rank_picture(ranks: DeltaRanks, runs: pd.DataFrame, *, name: str = "delta-ranks") -> Picture | None:
    """`rank_profile` of ranks that are there already; runs: those that they were made of."""
    if ranks.table.empty or ranks.table["block"].isna().all():
        return None
    means = _by_block(ranks.table)
    styles = styles_of(with_labels(runs.loc[runs["compared"]]))
    num_labels = means["label"].nunique()
    # A text tower's blocks come before an image tower's.
    num_stacks = ranks.table["block"].dropna().str.replace(r"\d+", "", regex=True).nunique()

    def draw() -> Figure:
        below = num_labels > _MOST_LABELS_BESIDE
        height = 4.6 + (0.1 * num_labels if below else 0)
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey=True).flatten()
        for axes, (measure, heading) in zip(panels, MEASURES.items(), strict=False):
            _draw_lines(axes, means, measure, styles)
            axes.set_title(heading)
            axes.set_xlabel("Block" if num_stacks == 1 else f"Block, {num_stacks} stacks in a row")
            axes.tick_params(labelbottom=True, labelleft=True)
        panels[0].set_yscale("log")
        plain_ticks(panels[0].yaxis, means["stable_rank"].min(), means["full"].max())
        panels[3].axis("off")
        handles = panels[0].get_legend_handles_labels()
        if below:
            figure.legend(*handles, loc="outside lower center", ncols=2)
        else:
            panels[3].legend(*handles, loc="center")
        return figure

    alt = (
        f"Effective, stable and numerical rank of the updates by block, mean over a block's matrices: "
        f"{_told(ranks.table)}. {' '.join(ranks.notes)}"
    )
    return Picture(name, "Rank of the updates over the layers", alt, draw)


def _draw_lines(axes: Axes, means: pd.DataFrame, measure: str, styles: Mapping[str, Style]) -> None:
    for label, group in means.groupby("label", sort=False):
        style = styles[str(label)]
        axes.plot(
            group["depth"],
            group[measure],
            color=color_of(style),
            marker=style.marker,
            markersize=5,
            markevery=max(1, len(group) // 8),
            label=label,
        )
    largest = means.drop_duplicates("depth").sort_values("depth")
    axes.plot(
        largest["depth"],
        largest["full"],
        color=text_color(),
        linestyle=(0, (2, 2)),
        linewidth=1,
        label="largest possible",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def write_ranks(ranks: DeltaRanks, output: Path, *, name: str) -> list[Path]:
    """Write <name>.md with the notes, .csv and .tex by kind of matrix, and <name>-matrices.csv with every matrix.

    Nothing where there are no ranks.
    """
    if ranks.table.empty:
        return []
    paths = write_tables(rank_summary(ranks), _COLUMNS, output, name=name)
    with (output / f"{name}.md").open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(f"- {note}" for note in ranks.notes) + "\n")
    every = output / f"{name}-matrices.csv"
    every.write_text(ranks.table.to_csv(index=False, lineterminator="\n"), encoding="utf-8")
    return [*paths, every]


def rank_summary(ranks: DeltaRanks) -> pd.DataFrame:
    """One row per label and kind of matrix: means over the n blocks."""
    figures = ["nonzero_percent", *MEASURES, "norm"]
    return _means(ranks.table, ["label", "kind", "num_rows", "num_columns"], figures)


_COLUMNS = (
    Column("Case", "label", lambda row: row["label"], is_number=False),
    Column("Matrix", "kind", lambda row: row["kind"], is_number=False),
    Column("Shape", "num_rows", lambda row: f"{row['num_rows']}×{row['num_columns']}"),
    Column("n", "n", lambda row: str(row["n"])),
    Column("Non-zero %", "nonzero_percent", lambda row: number(row["nonzero_percent"], digits=1)),
    Column("Effective rank", "effective_rank", lambda row: number(row["effective_rank"], digits=1)),
    Column("Stable rank", "stable_rank", lambda row: number(row["stable_rank"], digits=1)),
    Column("Numerical rank", "numerical_rank", lambda row: number(row["numerical_rank"], digits=1)),
    Column("Norm", "norm", lambda row: number(row["norm"], digits=3)),
)


def ranks_of(delta: np.ndarray) -> dict[str, float]:
    """The MEASURES of one matrix; NaN where it is all zero, which has no direction."""
    # Of the smaller Gram matrix: singular values below 1e-8 of the largest are lost, which no measure sees.
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
    largest = sigma.max()
    if largest == 0:
        return dict.fromkeys(MEASURES, math.nan)
    shares = sigma[sigma > 0] / sigma.sum()
    return {
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "stable_rank": float((sigma**2).sum() / largest**2),
        "numerical_rank": float((sigma > max(delta.shape) * _EPSILON * largest).sum()),
    }


def _row(delta: Delta, count: int) -> Row:
    weight = delta.make()
    return {
        "layer": delta.layer,
        "index": delta.index,
        "block": block_of(delta.layer),
        "kind": kind_of(delta.layer, delta.index, count),
        "num_rows": delta.shape[0],
        "num_columns": delta.shape[1],
        **ranks_of(weight),
        "nonzero_percent": 100 * float(np.count_nonzero(weight)) / weight.size,
        "norm": float(np.linalg.norm(weight)),
    }


def _within(found: Sequence[Delta], most_work: float) -> tuple[list[Delta], list[str]]:
    """The matrices that the bounds allow, and what was left out in words."""
    small = [delta for delta in found if math.prod(delta.shape) <= _MOST_ENTRIES]
    told = []
    if len(small) < len(found):
        told.append(f"{len(found) - len(small)} matrices of more than {_MOST_ENTRIES:,} entries are left out")
    every = math.ceil(sum(math.prod(delta.shape) * min(delta.shape) for delta in small) / most_work)
    if every <= 1:
        return small, told
    blocks = sorted({block_of(delta.layer) or "" for delta in small}, key=natural)
    kept = set(blocks[::every])
    told.append(f"of {len(blocks)} blocks one in {every} was measured")
    return [delta for delta in small if (block_of(delta.layer) or "") in kept], told


def _by_block(table: pd.DataFrame) -> pd.DataFrame:
    blocks = sorted(set(table["block"].dropna()), key=natural)
    depth = {block: index for index, block in enumerate(blocks)}
    numbered = table.dropna(subset=["block"]).assign(full=table[["num_rows", "num_columns"]].min(axis=1))
    numbered = numbered.assign(depth=numbered["block"].map(depth))
    return _means(numbered, ["label", "depth"], [*MEASURES, "full"])


def _means(table: pd.DataFrame, by: list[str], figures: Sequence[str]) -> pd.DataFrame:
    """One row per combination of `by`, in order of appearance: the figures' means, and n."""
    rows = []
    for _, group in table.groupby(by, sort=False):
        about = {name: group[name].iloc[0] for name in by}
        rows.append(about | {name: group[name].mean() for name in figures} | {"n": len(group)})
    return pd.DataFrame(rows)


def _told(table: pd.DataFrame) -> str:
    means = _means(table, ["label"], list(MEASURES))
    return "; ".join(
        f"{row['label']} {number(row['effective_rank'], digits=1)}, {number(row['stable_rank'], digits=1)}, "
        f"{number(row['numerical_rank'], digits=1)}"
        for row in rows_of(means)
    )


def _meaning(table: pd.DataFrame) -> list[str]:
    if table.empty:
        return []
    full = table["numerical_rank"] == table[["num_rows", "num_columns"]].min(axis=1)
    return [
        "Numerical rank misleads: it counts every direction above the noise floor of float32, however small, "
        f"and {full.sum()} of {len(table)} updates here have all of them. A sparse or kernelised update has no "
        "exact low rank, and a difference of two stored weights has the rounding of both; effective and stable "
        "rank weigh the directions instead."
    ]
