"""How much less memory the kernelised methods need than others, in equal settings, beside the published."""

import math
from collections.abc import Sequence

import pandas as pd

from analysis.groups import capitalized, method_name
from analysis.load import Row, rows_of
from analysis.scaling.cases import RANKED, has_peak, memory_text, params_text
from analysis.scaling.published import PUBLISHED_MEMORY, SOURCE, published_of
from analysis.tables import Column, number, source

SUBJECTS = ("snell", "snella", "klora")
BASES = ("full", "gps", "lora")


def savings(cases: pd.DataFrame) -> pd.DataFrame:
    """One row per SNELL, SNELLA or dense case and full, GPS or LoRA case of the same setting and rank.

    Equal are model, data, task, engine, world size, batch and microbatch, precision, checkpointing, optimizer and
    every other condition that the records know, the source of the memory, and the rank where the base has one.
    Columns: the subject's of `scaling_cases`, base_label, base_method, base_peak_mib, saving_percent (negative:
    more memory), published_percent (NaN where nothing is printed of that model and pair).
    """
    usable = has_peak(cases)
    bases: dict[str, list[Row]] = {}
    for base in rows_of(usable.loc[usable["method"].isin(BASES)]):
        bases.setdefault(base["setting"], []).append(base)
    rows = []
    for subject in rows_of(usable.loc[usable["method"].isin(SUBJECTS)]):
        equal = [base for base in bases.get(subject["setting"], ()) if _equal_rank(base, subject)]
        rows += [subject | _against(subject, base) for base in equal]
    return pd.DataFrame(rows)


def saving_columns(table: pd.DataFrame) -> Sequence[Column]:
    """How `savings` is shown."""
    return (
        Column("Model", "model", lambda row: str(row["model"]), is_number=False),
        Column("Model size", "num_total_params", lambda row: params_text(row["num_total_params"])),
        Column("Method", "label", lambda row: row["label"], is_number=False),
        Column("Against", "base_label", lambda row: row["base_label"], is_number=False),
        Column("Engine", "engine", lambda row: row["engine"], is_number=False),
        Column("Ranks", "world_size", lambda row: str(row["world_size"])),
        Column("Batch", "batch_size", lambda row: str(row["batch_size"])),
        Column("Peak", "peak_mib", lambda row: memory_text(row["peak_mib"])),
        Column("Peak of the other", "base_peak_mib", lambda row: memory_text(row["base_peak_mib"])),
        Column("Saving %", "saving_percent", lambda row: number(row["saving_percent"], digits=1)),
        Column(
            "Published % (batch 8)", "published_percent", lambda row: number(row["published_percent"], digits=1)
        ),
        Column("Source", "predicted", lambda row: source(row["predicted"]), is_number=False),
    )


def published_table() -> pd.DataFrame:
    """The published peaks and the savings that they amount to, one row per model; with "status" for printing."""
    rows = []
    for row in PUBLISHED_MEMORY:
        peaks = {f"{method}_mb": peak for method, peak in row.peak_mb.items()}
        against = {f"against_{base}_percent": row.saving_percent("snell", base) for base in ("gps", "lora")}
        rows.append({"model": row.model, **peaks, **against, "status": "ok"})
    return pd.DataFrame(rows)


PUBLISHED_COLUMNS = (
    Column("Model", "model", lambda row: row["model"], is_number=False),
    Column("LoRA-8 MB", "lora_mb", lambda row: number(row["lora_mb"], digits=0)),
    Column("SNELL MB", "snell_mb", lambda row: number(row["snell_mb"], digits=0)),
    Column("GPS MB", "gps_mb", lambda row: number(row["gps_mb"], digits=0)),
    Column(
        "SNELL against GPS %", "against_gps_percent", lambda row: number(row["against_gps_percent"], digits=1)
    ),
    Column(
        "SNELL against LoRA %", "against_lora_percent", lambda row: number(row["against_lora_percent"], digits=1)
    ),
)


def saving_sentences(table: pd.DataFrame) -> list[str]:
    """The range of the savings of each pair, measured and predicted apart, then the published ones."""
    told = []
    if not table.empty:
        groups = table.groupby(["predicted", "method", "base_method"], sort=False)
        told = [_pair_sentence(group) for _, group in groups]
    printed = published_table()
    gps, lora = (_range(list(printed[f"against_{base}_percent"])) for base in ("gps", "lora"))
    return [*told, f"Published: SNELL needs {gps} than GPS, and {lora} than LoRA ({SOURCE})."]


def _equal_rank(base: Row, subject: Row) -> bool:
    return base["method"] not in RANKED or base["rank"] == subject["rank"]


def _against(subject: Row, base: Row) -> Row:
    published = published_of(str(subject["architecture"]), image_size=subject["image_size"])
    printed = published and published.saving_percent(str(subject["method"]), str(base["method"]))
    return {
        "base_label": base["label"],
        "base_method": base["method"],
        "base_peak_mib": base["peak_mib"],
        "saving_percent": 100 * (1 - subject["peak_mib"] / base["peak_mib"]),
        "published_percent": math.nan if printed is None else printed,
    }


def _pair_sentence(group: pd.DataFrame) -> str:
    verb = "is predicted to need" if group["predicted"].all() else "needs"
    subject, base = (method_name(str(group[name].iloc[0])) for name in ("method", "base_method"))
    cases = "1 case" if len(group) == 1 else f"{len(group)} cases"
    return (
        f"{capitalized(subject)} {verb} {_range(list(group['saving_percent']))} than {base} at its "
        f"peak ({cases} in equal settings, {_sizes(group)})."
    )


def _sizes(group: pd.DataFrame) -> str:
    low, high = (
        params_text(value) for value in (group["num_total_params"].min(), group["num_total_params"].max())
    )
    return f"{low} parameters" if low == high else f"{low} to {high} parameters"


def _range(savings_percent: Sequence[float]) -> str:
    """ "31.1 to 39.9 % less memory", "3.9 to 8.2 % more memory", or "between 2 % more and 5 % less memory"."""
    low, high = min(savings_percent), max(savings_percent)
    if low < 0 < high:
        return f"between {-low:.1f} % more and {high:.1f} % less memory"
    ends = sorted({f"{abs(low):.1f}", f"{abs(high):.1f}"}, key=float)
    return f"{' to '.join(ends)} % {'less' if high > 0 else 'more'} memory"
