"""What ranks tell each other in a training step: wire bytes per rank, and payload by operation."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.groups import method_name
from analysis.load import Row, rows_of
from analysis.rows import MIB
from analysis.tables import Column, number, source
from snell_scale.records import read_result

# In the order of tables and figures: what reduces gradients, what gathers weights, then the rest.
OPERATIONS = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "reduce",
    "all_to_all",
    "gather",
    "scatter",
)


def traffic(cases: pd.DataFrame) -> pd.DataFrame:
    """One row per case whose record tells what its collectives carried.

    Columns beside those of `scaling_cases`: wire_mib (of one rank in one step), payload_mib, <operation>_mib and
    <operation>_calls of every operation that any of the cases called, uncounted (operations without a count).
    """
    rows = []
    for case in rows_of(cases.loc[cases["wire_bytes_per_rank"].notna()]):
        found = read_result(Path(case["folder"])).communication or {}
        payload = found.get("payload_bytes", math.nan)
        row: Row = {"wire_mib": case["wire_bytes_per_rank"] / MIB, "payload_mib": payload / MIB}
        for name, entry in found.get("operations", {}).items():
            row |= {f"{name}_mib": entry["payload_bytes"] / MIB, f"{name}_calls": entry["calls"]}
        rows.append(case | row | {"uncounted": " ".join(found.get("uncounted_operations", ()))})
    return pd.DataFrame(rows)


def operations_of(table: pd.DataFrame) -> list[str]:
    """The operations that any case called."""
    called = [str(name).removesuffix("_calls") for name in table if str(name).endswith("_calls")]
    return sorted(called, key=lambda name: OPERATIONS.index(name) if name in OPERATIONS else len(OPERATIONS))


def mib_text(value: float) -> str:
    """Digits by size: adapters of kilobytes, models of gigabytes."""
    return number(value, digits=0 if abs(value) >= 100 else 1 if abs(value) >= 1 else 3)


def traffic_columns(table: pd.DataFrame) -> Sequence[Column]:
    """How `traffic` is shown."""
    shown = [
        Column("Model", "model", lambda row: str(row["model"]), is_number=False),
        Column("Method", "label", lambda row: row["label"], is_number=False),
        Column("Engine", "engine", lambda row: row["engine"], is_number=False),
        Column("Ranks", "world_size", lambda row: str(row["world_size"])),
        Column("Batch", "batch_size", lambda row: str(row["batch_size"])),
        Column("Wire MiB per rank", "wire_mib", lambda row: mib_text(row["wire_mib"])),
        Column("Payload MiB", "payload_mib", lambda row: mib_text(row["payload_mib"])),
    ]
    for name in operations_of(table):
        heading = f"{name.replace('_', '-')} MiB (calls)"
        shown.append(Column(heading, f"{name}_mib", lambda row, name=name: _with_calls(row, name)))
    return [*shown, Column("Source", "predicted", lambda row: source(row["predicted"]), is_number=False)]


def traffic_sentences(table: pd.DataFrame) -> list[str]:
    """Per engine the wire bytes of every method, beside full fine-tuning's."""
    if table.empty:
        return []
    told = []
    for _, group in table.groupby(["engine", "predicted"], sort=False):
        first, ranks = rows_of(group)[0], sorted(set(group["world_size"]))
        verb = "is predicted to send" if first["predicted"] else "sends"
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        told.append(
            f"On {first['engine']} with {span} ranks a rank {verb} per step, in MiB: {_by_method(group, table)}."
        )
    told.append(
        "Wire bytes are those of rings of collectives (instrument/communication.py), not measured on a link."
    )
    uncounted = sorted(set(" ".join(table["uncounted"]).split()))
    return told + ([f"Without a count, so missing above: {', '.join(uncounted)}."] if uncounted else [])


def _by_method(group: pd.DataFrame, table: pd.DataFrame) -> str:
    """Each method's wire MiB, and their share of full fine-tuning's in the same setting."""
    full = table.loc[table["method"] == "full"].groupby("setting")["wire_mib"].agg("mean").to_dict()
    parts = []
    for method, rows in group.groupby("method", sort=False):
        beside = [row for row in rows_of(rows) if full.get(row["setting"], 0) > 0]
        percent = _span([100 * row["wire_mib"] / full[row["setting"]] for row in beside]) if beside else ""
        share = f" ({percent} % of full fine-tuning's)" if percent and method != "full" else ""
        parts.append(f"{method_name(str(method))} {_span(list(rows['wire_mib']))}{share}")
    return ", ".join(parts)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _with_calls(row: Row, name: str) -> str:
    size, calls = row[f"{name}_mib"], row[f"{name}_calls"]
    return "–" if math.isnan(calls) else f"{mib_text(size)} ({calls:g})"
