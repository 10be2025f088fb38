"""Predicted beside measured peaks of the same job: how far `snell-scale estimate` was off."""

from collections.abc import Sequence

import pandas as pd

from analysis.load import Row, rows_of
from analysis.scaling.cases import has_peak, memory_text
from analysis.tables import Column, number

# What both know of a job. An estimate knows no hardware, and says nothing of the allocator.
_SAME = (
    "label",  # the method and what of it is varied
    "rank",
    "model",
    "engine",
    "world_size",
    "batch_size",
    "microbatch_size",
    "gradient_accumulation",
    "precision",
    "frozen_dtype",
    "activation_checkpointing",
    "optimizer",
    "image_size",
    "ema_decay",
    "compile",
    "fused_attention",
)


def predictions(cases: pd.DataFrame) -> pd.DataFrame:
    """One row per measured case of which there is exactly one prediction, for the same kind of device.

    Columns: those of `scaling_cases`, predicted_mib and error_percent (of the measured peak; above 0: too much
    was predicted).
    """
    usable = has_peak(cases)
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows_of(usable.loc[usable["predicted"]]):
        found.setdefault(_job(row), []).append(row)
    rows = []
    for row in rows_of(usable.loc[~usable["predicted"]]):
        candidates = found.get(_job(row), [])
        if len(candidates) == 1:
            peak = candidates[0]["peak_mib"]
            rows.append(row | {"predicted_mib": peak, "error_percent": 100 * (peak / row["peak_mib"] - 1)})
    return pd.DataFrame(rows)


def prediction_columns(table: pd.DataFrame) -> Sequence[Column]:
    """How `predictions` are shown."""
    return (
        Column("Model", "model", lambda row: str(row["model"]), is_number=False),
        Column("Method", "label", lambda row: row["label"], is_number=False),
        Column("Engine", "engine", lambda row: row["engine"], is_number=False),
        Column("Ranks", "world_size", lambda row: str(row["world_size"])),
        Column("Batch", "batch_size", lambda row: str(row["batch_size"])),
        Column("Checkpointing", "activation_checkpointing", lambda row: str(row["activation_checkpointing"])),
        Column("Measured", "peak_mib", lambda row: memory_text(row["peak_mib"])),
        Column("Predicted", "predicted_mib", lambda row: memory_text(row["predicted_mib"])),
        Column("Error %", "error_percent", lambda row: number(row["error_percent"], digits=2)),
    )


def prediction_sentences(table: pd.DataFrame) -> list[str]:
    """The errors of all pairs in one sentence."""
    if table.empty:
        return ["No job was both measured and predicted: nothing here checks the predictions."]
    errors = table["error_percent"]
    pairs = "1 job" if len(table) == 1 else f"{len(table)} jobs"
    return [
        f"Predicted against measured peaks of {pairs}: off by {errors.min():+.2f} to {errors.max():+.2f} %, "
        f"{errors.abs().mean():.2f} % on average."
    ]


def _job(row: Row) -> tuple[str, ...]:
    device = str(row["memory_device"]).partition(":")[0]
    return (device, *("" if pd.isna(row[name]) else str(row[name]) for name in _SAME))
