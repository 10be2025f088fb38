"""How `methods_table` is shown: intervals, differences from the baseline with p values, the Pareto front."""

from collections.abc import Sequence

import pandas as pd

from analysis.comparison.fairness import field_name, field_text
from analysis.groups import capitalized
from analysis.load import Row
from analysis.tables import Column, number, size
from snell_scale import metrics


def comparison_columns(
    table: pd.DataFrame, metric: str, *, fields: Sequence[str] = (), label: str = ""
) -> list[Column]:
    """What any row has a value of is shown; the label of unlike runs stands in the first heading."""
    first = f"Method ({label})" if label else "Method"
    shown = [
        Column(first, "label", lambda row: row["label"], is_number=False),
        *map(_field, fields),
        Column("n", "n", lambda row: str(row["n"])),
    ]
    if (table["status"] != "ok").any():
        shown.append(Column("Status", "status", lambda row: row["status"], is_number=False))
    measured = [name.removesuffix("_mean") for name in table if str(name).endswith("_mean")]
    scores = [name for name in measured if name not in ("peak_total_mib", "images_per_s")]
    shown += [_score(name, metric) for name in scores if table[f"{name}_mean"].notna().any()]
    if (table["num_pairs"] > 0).any():
        shown += _differences(metric)
    return [
        *shown,
        Column("Peak MiB", "peak_total_mib_mean", lambda row: _interval(row, "peak_total_mib", None)),
        Column("Images/s", "images_per_s_mean", lambda row: _interval(row, "images_per_s", 0)),
        Column("Pareto", "front", _front, is_number=False),
    ]


def _field(field: str) -> Column:
    name = field_name(field)
    heading = name if "." in name else capitalized(name).replace("_", " ")
    return Column(heading, field, lambda row: field_text(row[field]), is_number=False)


def _score(name: str, metric: str) -> Column:
    found = metrics.metric(metric if name == "score" else name.removeprefix("test_"))
    digits = found.digits
    return Column(capitalized(found.label), f"{name}_mean", lambda row: _interval(row, name, digits))


def _differences(metric: str) -> list[Column]:
    digits = metrics.metric(metric).digits
    return [
        Column("Difference", "difference", lambda row: _difference(row, digits)),
        Column("p (t)", "p_t_holm", lambda row: _p_text(row["p_t_holm"])),
        Column("p (flips)", "p_flips_holm", lambda row: _p_text(row["p_flips_holm"])),
    ]


def _interval(row: Row, name: str, digits: int | None) -> str:
    mean, half = row[f"{name}_mean"], row[f"{name}_half"]
    texts = [size(value) if digits is None else number(value, digits=digits) for value in (mean, half)]
    return texts[0] if half != half else " ± ".join(texts)


def _difference(row: Row, digits: int) -> str:
    if row["label"] == row["baseline"]:
        return "baseline"
    value = number(row["difference"], digits=digits)
    sign = "+" if row["difference"] > 0 else ""
    half = row["difference_half"]
    return sign + value + ("" if half != half else f" ± {number(half, digits=digits)}")


def _p_text(value: float) -> str:
    return "<0.001" if value < 0.001 else number(value, digits=3)


def _front(row: Row) -> str:
    return "–" if row["front"] is None else "front" if row["front"] else ""
