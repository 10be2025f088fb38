"""Images per second and memory against the number of ranks: which runs scale strongly, weakly, or neither."""

import math
from collections.abc import Sequence

import pandas as pd

from analysis.groups import method_name
from analysis.load import Row, rows_of
from analysis.scaling.cases import listed, memory_text
from analysis.tables import Column, number, source

STRONG, WEAK, NEITHER = "strong", "weak", "neither"
_MOST_LISTED = 12


def rank_scaling(cases: pd.DataFrame) -> pd.DataFrame:
    """One row per case and series: jobs that differ in the number of ranks, and else only as the series says.

    strong: equal global batch. weak: equal batch per rank. neither: no job of another number of ranks has the
    same of one of them. A series needs two numbers of ranks of one engine; a run of the engine "single" is the
    one-rank job of an engine that has none. Runs without any job of another number of ranks are left out.
    Columns: those of `scaling_cases`, series, series_key (equal within one series), per_rank (batch), base (its
    first job in words) and efficiency_percent (images per second and rank, over the base's).
    """
    rows: list[Row] = []
    usable = cases.loc[cases["predicted"] | (cases["status"] == "ok")]
    for group in _jobs(usable):
        kinds = {STRONG: "batch_size", WEAK: "per_rank"}
        members = [
            (kind, series)
            for kind, name in kinds.items()
            for _, series in group.groupby(name, sort=False)
            if series["world_size"].nunique() > 1
        ]
        taken = {index for _, series in members for index in series.index}
        rows += [row for kind, series in members for row in _series(series, kind)]
        rest = group.loc[~group.index.isin(taken) & (group["engine"] != "single")]
        rows += [_member(row, NEITHER, "", math.nan) for row in rows_of(rest)]
    return pd.DataFrame(rows)


def scaling_columns(table: pd.DataFrame) -> Sequence[Column]:
    """How `rank_scaling` is shown."""
    return (
        Column("Series", "series", lambda row: row["series"], is_number=False),
        Column("Model", "model", lambda row: str(row["model"]), is_number=False),
        Column("Method", "label", lambda row: row["label"], is_number=False),
        Column("Engine", "engine", lambda row: row["engine"], is_number=False),
        Column("Ranks", "world_size", lambda row: str(row["world_size"])),
        Column("Batch", "batch_size", lambda row: str(row["batch_size"])),
        Column("Batch per rank", "per_rank", lambda row: number(row["per_rank"], digits=0)),
        Column("Images/s", "images_per_s", lambda row: number(row["images_per_s"], digits=1)),
        Column("Efficiency %", "efficiency_percent", lambda row: number(row["efficiency_percent"], digits=0)),
        Column("Relative to", "base", lambda row: row["base"] or "–", is_number=False),
        Column("Peak per rank", "peak_mib", lambda row: memory_text(row["peak_mib"])),
        Column("Source", "predicted", lambda row: source(row["predicted"]), is_number=False),
    )


def scaling_sentences(table: pd.DataFrame) -> list[str]:
    """What limits the efficiencies, then these at the end of each series, and what memory does."""
    if table.empty:
        return ["No two runs differ in the number of ranks: nothing is said of strong or weak scaling."]
    told = _shared_cores(table)
    ends = _ends(table)
    if not ends.empty:
        for _, group in ends.groupby(["series", "kept", "predicted"], sort=False):
            told += _group_sentences(group)
    lost = table.loc[table["series"] == NEITHER]
    if not lost.empty:
        jobs = [
            f"{row['label']} on {row['engine']} with {row['world_size']} ranks and batch {row['batch_size']}"
            for row in rows_of(lost)
        ]
        told.append(
            "Neither strong nor weak scaling, for no other job has that batch or batch per rank: "
            f"{listed(jobs, most=_MOST_LISTED)}."
        )
    return told


def _shared_cores(table: pd.DataFrame) -> list[str]:
    timed = table.loc[table["images_per_s"].notna()]
    if not (timed["memory_device"] == "cpu").any():
        return []
    return [
        "Some of these ranks ran on processors: ranks of one machine share its cores, so their efficiency is "
        "no measure of what as many machines would reach."
    ]


def _jobs(cases: pd.DataFrame) -> list[pd.DataFrame]:
    """Cases that are equal but for ranks and batch, of one engine; with single's where it has no one-rank job."""
    cases = cases.assign(per_rank=cases["batch_size"] / cases["world_size"], kept=cases["engine"])
    found = []
    for _, group in cases.groupby(["job", "label"], sort=False):
        alone = group.loc[group["engine"] == "single"]
        for engine, jobs in group.loc[group["engine"] != "single"].groupby("engine", sort=False):
            starts = alone if (jobs["world_size"] > 1).all() else alone.iloc[:0]
            together = pd.concat([starts.assign(kept=engine), jobs])
            if together["world_size"].nunique() > 1:
                found.append(together)
    return found


def _series(series: pd.DataFrame, kind: str) -> list[Row]:
    series = series.sort_values("world_size", kind="stable")
    rows = rows_of(series)
    base = rows[0]
    words = (
        f"{base['engine']}, 1 rank"
        if base["world_size"] == 1
        else f"{base['engine']}, {base['world_size']} ranks"
    )
    per_rank = base["images_per_s"] / base["world_size"]
    constant = base["batch_size"] if kind == STRONG else base["per_rank"]
    key = "\n".join((kind, *(str(base[name]) for name in ("job", "label", "kept")), str(constant)))
    return [
        _member(row, kind, words, 100 * row["images_per_s"] / row["world_size"] / per_rank) | {"series_key": key}
        for row in rows
    ]


def _member(row: Row, kind: str, base: str, efficiency_percent: float) -> Row:
    return row | {"series": kind, "series_key": "", "base": base, "efficiency_percent": efficiency_percent}


def _ends(table: pd.DataFrame) -> pd.DataFrame:
    """The last job of every series, beside its first."""
    rows = []
    for _, series in table.loc[table["series"] != NEITHER].groupby("series_key", sort=False):
        members = rows_of(series)
        first, last = members[0], members[-1]
        percent = 100 * last["peak_mib"] / first["peak_mib"]
        rows.append(last | {"memory_percent": percent, "first_world_size": first["world_size"]})
    return pd.DataFrame(rows)


def _group_sentences(ends: pd.DataFrame) -> list[str]:
    """What all series of one kind, engine and source come to, by method."""
    first = rows_of(ends)[0]
    equal = "global batch" if first["series"] == STRONG else "batch per rank"
    low, high = ends["world_size"].min(), ends["world_size"].max()
    where = f"{first['series'].capitalize()} scaling (equal {equal}) on {first['kept']}"
    ranks = f"{high}" if low == high else f"{low} to {high}"
    told = []
    if ends["efficiency_percent"].notna().any():
        told.append(
            f"{where}: images/s per rank on the most ranks ({ranks}), of what the smallest job reaches: "
            f"{_by_method(ends, 'efficiency_percent')}."
        )
    if ends["memory_percent"].notna().any():
        verb = "is predicted to come to" if first["predicted"] else "comes to"
        told.append(
            f"{where}: the peak of the fullest of {ranks} ranks {verb}, of what the smallest job needs per rank: "
            f"{_by_method(ends, 'memory_percent')}."
        )
    return told


def _by_method(ends: pd.DataFrame, figure: str) -> str:
    parts = []
    for method, group in ends.dropna(subset=[figure]).groupby("method", sort=False):
        low, high = f"{group[figure].min():.0f}", f"{group[figure].max():.0f}"
        parts.append(f"{method_name(str(method))} {low if low == high else f'{low} to {high}'} %")
    return ", ".join(parts)
