"""What a reader of a comparison has to know: how its numbers were made, and what they cannot tell."""

from collections.abc import Sequence

import pandas as pd

from analysis.comparison.fairness import field_name, field_text, unknown_fields
from analysis.comparison.methods_table import DEFAULT_BASELINE
from analysis.comparison.pareto import objectives
from analysis.comparison.significance import ALPHA, seeds_needed, smallest_flip_p
from analysis.groups import method_name, metric_name

_COSTS = {"peak_total_mib_mean": "peak memory", "images_per_s_mean": "images/s"}


def notes(table: pd.DataFrame, runs: pd.DataFrame, metric: str, *, label: str, by: Sequence[str]) -> list[str]:
    """Sentences on `methods_table`'s rows and their runs. label: of unlike runs, empty for like ones."""
    told = [label] if label else []
    if runs["predicted"].any():
        which = "all rows are" if runs["predicted"].all() else 'rows marked "(predicted)" are'
        told.append(f"{which} predicted by `snell-scale estimate`: nothing of them ran")
    told.append("mean ± half of the 95 % interval over n seeds (Student's t)")
    axes = objectives(table, metric)
    if "score_mean" in axes:
        told[-1] += f"; of {metric_name(metric)} {'more' if axes['score_mean'] > 0 else 'less'} is better"
    for values, group in combinations(table, by):
        told += _test_notes(group, f" ({values})" if values else "")
    names = ", ".join({"score_mean": metric_name(metric), **_COSTS}[column] for column in axes)
    told.append(f"Pareto front: no other row is at least as good in {names} and better in one, by the means")
    unknown = unknown_fields(runs)
    if unknown:
        told.append(f"in no record, so not checked to be alike: {', '.join(unknown)}")
    return told


def combinations(table: pd.DataFrame, by: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each combination of values of `by`, and those values in words."""
    if not by:
        return [("", table)]
    groups = [group for _, group in table.groupby(list(by), dropna=False, sort=False)]
    return [
        (", ".join(f"{field_name(field)} {field_text(group[field].iloc[0])}" for field in by), group)
        for group in groups
    ]


def _test_notes(table: pd.DataFrame, where: str) -> list[str]:
    """Of the rows that have one baseline."""
    tested = table.loc[table["num_pairs"] > 1]
    if tested.empty:
        return _untested_notes(table, where)
    baseline, count, fewest = table["baseline"].iloc[0], len(tested), int(tested["num_pairs"].min())
    correction = f", with Holm's correction over {count} tests" if count > 1 else ""
    told = [
        f"difference from {baseline}{where} over the {_values(tested['num_pairs'])} seeds that both have; "
        f"p: two-sided{correction}; t: paired t test; flips: sign-flip "
        "permutation test, which supposes no normal distribution"
    ]
    smallest = smallest_flip_p(fewest)
    if count * smallest > ALPHA:
        corrected = f", corrected {min(1.0, count * smallest):.3g}" if count > 1 else ""
        told.append(
            f"{fewest} seeds{where}: the smallest p of a sign-flip test is {smallest:.3g}{corrected}; "
            f"for {ALPHA:g} it takes {seeds_needed(count)} seeds or more"
        )
    return told + _untested_notes(table, where)


def _untested_notes(table: pd.DataFrame, where: str) -> list[str]:
    """Why rows with a score stand there without a test, each reason once."""
    scored = table.loc[(table["status"] == "ok") & table["score_mean"].notna()]
    baseline = table["baseline"].iloc[0]
    others = scored.loc[scored["label"] != baseline]
    if not baseline:
        several = list(scored.loc[scored["method"] == DEFAULT_BASELINE, "label"].unique())
        why = (
            f"{method_name(DEFAULT_BASELINE)} has several rows" if len(several) > 1 else "no row is the baseline"
        )
        rows = "; ".join(several if len(several) > 1 else scored["label"])
        return [f"no differences{where}: {why}; name one with --baseline: {rows}"] if len(scored) > 1 else []
    reasons = {
        f"no difference from {baseline}{where}, as no seed ended ok in both": others["num_pairs"] == 0,
        f"no test against {baseline}{where}, as one seed alone ended ok in both": others["num_pairs"] == 1,
        f"no t test against {baseline}{where}, as the difference is the same for every seed": (
            (others["num_pairs"] > 1) & others["p_t"].isna()
        ),
    }
    return [f"{why}: {'; '.join(others.loc[has, 'label'])}" for why, has in reasons.items() if has.any()]


def _values(column: pd.Series) -> str:
    return ", ".join(field_text(value) for value in sorted(column.dropna().unique()))
