"""Methods side by side in numbers: means with intervals, differences from a baseline, the Pareto front."""

import math
from collections.abc import Sequence

import pandas as pd

from analysis.comparison.fairness import FIELDS, field_texts
from analysis.comparison.pareto import front, objectives
from analysis.comparison.significance import Difference, half_width, holm, paired_difference
from analysis.groups import others_of, with_labels
from analysis.load import Row, rows_of
from snell_scale.records import STATUSES

DEFAULT_BASELINE = "lora"


def methods_table(
    runs: pd.DataFrame,
    metric: str,
    *,
    baseline: str | None = None,
    by: Sequence[str] = (),
    fields: Sequence[str] = (),
) -> pd.DataFrame:
    """One row per label and status within each combination of values of the columns `by`.

    Columns: `by` and `fields`, what else a row has one value of; label, method, status, predicted, n, seeds;
    score_mean and score_half (half of the 95 % interval of the mean over seeds, NaN for one seed), the same of
    each further reported metric as test_<metric>, of peak_total_mib and of images_per_s; trainable_percent;
    front, whether the row is on the Pareto front (None: not judged); baseline, the label compared with (empty:
    none); num_pairs, difference, difference_half, p_t, p_flips over the seeds that ended ok in both; p_t_holm,
    p_flips_holm, corrected over one combination's rows.

    baseline: a label, or a method that has one label; None takes LoRA where it has one.
    ValueError: no such baseline, or two runs of one label and seed.
    """
    groups = [group for _, group in runs.groupby(list(by), dropna=False, sort=True)] if by else [runs]
    parts, was_found, others = [], False, others_of(runs)
    for group in groups:
        labelled = _labelled(group)
        label = _baseline_of(labelled, baseline)
        was_found = was_found or label is not None
        rows = [_row(same, (*by, *fields), others) for same in _same(labelled)]
        parts.append(_with_differences(rows, labelled, label))
    if baseline is not None and not was_found:
        names = ", ".join(dict.fromkeys(label for part in parts for label in part["label"]))
        raise ValueError(f"baseline is {baseline!r}, expected a method or one of these rows: {names}")
    for part in parts:
        part["front"] = pd.Series(front(part, objectives(part, metric)), dtype=object)
    return pd.concat(parts, ignore_index=True)


def _labelled(runs: pd.DataFrame) -> pd.DataFrame:
    """As `with_labels`; runs that differ in a field of FIELDS never have one label, predicted ones say so."""
    labelled = with_labels(runs)
    labels = labelled["label"].astype(object)
    for field in FIELDS[:-1]:
        texts = field_texts(labelled, field)
        values = texts.groupby(labels.loc[texts.index]).nunique()
        ambiguous = labels.isin(values.index[values > 1]) & labels.index.isin(texts.index)
        labels = labels.where(~ambiguous, labels + f", {field}=" + texts.reindex(labels.index).fillna(""))
    predicted = labelled["predicted"].astype(bool)
    labelled = labelled.assign(label=labels.where(~predicted, labels + " (predicted)"))
    _check_once(labelled)
    return labelled


def _check_once(labelled: pd.DataFrame) -> None:
    seen: dict[tuple[str, int], str] = {}
    for run in rows_of(labelled):
        key = (run["label"], run["seed"])
        if key in seen:
            raise ValueError(
                f"two runs of {key[0]} have seed {key[1]}: {seen[key]} and {run['folder']}; give one of them"
            )
        seen[key] = run["folder"]


def _baseline_of(labelled: pd.DataFrame, baseline: str | None) -> str | None:
    if baseline in set(labelled["label"]):
        return baseline
    wanted = baseline or DEFAULT_BASELINE
    labels = list(labelled.loc[labelled["method"] == wanted, "label"].unique())
    if len(labels) > 1 and baseline is not None:
        raise ValueError(f"baseline is {baseline!r}, which has several rows: name one of {'; '.join(labels)}")
    return labels[0] if len(labels) == 1 else None


def _same(labelled: pd.DataFrame) -> list[pd.DataFrame]:
    """The runs of each label and status, in the order of the labels."""
    return [
        labelled.loc[(labelled["label"] == label) & (labelled["status"] == status)]
        for label in labelled["label"].unique()
        for status in STATUSES
        if ((labelled["label"] == label) & (labelled["status"] == status)).any()
    ]


def _row(runs: pd.DataFrame, fields: Sequence[str], others: Sequence[str]) -> Row:
    row: Row = {
        **{field: runs[field].iloc[0] for field in fields},
        "label": runs["label"].iloc[0],
        "method": runs["method"].iloc[0],
        "status": runs["status"].iloc[0],
        "predicted": bool(runs["predicted"].iloc[0]),
        "n": len(runs),
        "seeds": " ".join(str(seed) for seed in sorted(runs["seed"])),
    }
    further = [f"test_{name}" for name in others if f"test_{name}" in runs]
    for name in ("score", *further, "peak_total_mib", "images_per_s"):
        values = [float(value) for value in runs[name].dropna()]
        mean = sum(values) / len(values) if values else math.nan
        row |= {f"{name}_mean": mean, f"{name}_half": half_width(values)}
    return row | {"trainable_percent": runs["trainable_percent"].mean()}


def _with_differences(rows: list[Row], labelled: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    ok = labelled.loc[labelled["status"] == "ok"].dropna(subset=["score"])
    scores = {str(label): group.set_index("seed")["score"] for label, group in ok.groupby("label")}
    differences = [_difference(row, scores, baseline) for row in rows]
    table = pd.DataFrame(rows).assign(
        baseline=baseline or "",
        num_pairs=[found.num_pairs for found in differences],
        difference=[found.mean for found in differences],
        difference_half=[found.half_width for found in differences],
    )
    for name in ("p_t", "p_flips"):
        values = [getattr(found, name) for found in differences]
        table = table.assign(**{name: values, f"{name}_holm": holm(values)})
    return table


def _difference(row: Row, scores: dict[str, pd.Series], baseline: str | None) -> Difference:
    """Of a row that ended ok from the baseline's, over their common seeds."""
    label = row["label"]
    if row["status"] != "ok" or label == baseline or label not in scores or baseline not in scores:
        return Difference(0, *[math.nan] * 4)
    seeds = sorted(set(scores[label].index) & set(scores[baseline].index))
    return paired_difference(list(scores[label].loc[seeds]), list(scores[baseline].loc[seeds]))
