"""What the data say, in sentences: made from the comparison's numbers, and honest about their spread."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.comparison.fairness import FIELDS, field_texts
from analysis.comparison.significance import ALPHA, smallest_flip_p
from analysis.groups import SETTINGS, metric_name, metric_of, varied_keys, with_labels
from analysis.load import rows_of
from analysis.rows import Row
from analysis.tables import mean_and_std, number, score, size
from snell_scale import metrics

_SUBJECTS = ("snell", "snella")
_BASELINES = ("lora", "full")
_MOST_NAMED = 6
# Varied keys by which a field differs that is not named as they are; of every other it is its ".name".
_STUDIED_BY: dict[str, str | tuple[str, ...]] = {
    "dataset": "varied.data.",
    "data": "varied.data.",
    "total_steps": ("varied.training.steps", "varied.training.epochs"),
}


def sentences(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """The best method, SNELL and SNELLA beside LoRA and full fine-tuning, then whatever limits these.

    What was measured is never told of together with what was predicted: predictions speak where there is no more.
    """
    told = _predictions(table, runs)
    measured, ran = table.loc[~table["predicted"]], runs.loc[~runs["predicted"]]
    if measured.empty:
        return told + _comparisons(table, runs, with_score=False)
    return _comparisons(measured, ran, with_score=True) + told


def _comparisons(table: pd.DataFrame, runs: pd.DataFrame, *, with_score: bool) -> list[str]:
    """What one source of figures says; of predictions there is no score to tell."""
    metric = metric_of(runs)
    pairs, spoken_of = [], {}
    for subject, baseline in itertools.product(_SUBJECTS, _BASELINES):
        rows = _ok_rows(table, subject)
        if not rows:
            continue
        row = _chosen(rows)
        others = _alike(_ok_rows(table, baseline), row)
        if others:
            other = _chosen(others)
            pairs.append((row, other))
            spoken_of |= {row["label"]: rows, other["label"]: others}
    told = [_best(table, metric)] if with_score else []
    told += [_against(row, other, metric=metric) for row, other in pairs]
    return told + _variants(spoken_of) + _failures(runs) + _few_seeds(table) + _copies(runs) + _unlike(runs)


def source_sentences(runs: pd.DataFrame) -> list[str]:
    """What made the values of metrics whose name does not say it: one sentence per source and its metrics."""
    told: dict[str, list[str]] = {}
    for text in sorted(set(runs["metric_sources"])):
        for name, source in json.loads(text).items():
            told.setdefault(source, []).append(metric_name(name))
    return [f"{_listed(list(dict.fromkeys(names)))}: {source}." for source, names in told.items()]


def protocol_sentence(runs: pd.DataFrame) -> str:
    """How the reported number came about."""
    protocols = set(runs["protocol"])
    if protocols == {"validation"}:
        return (
            "Protocol: the validation split chose the weights of every run; the test split was read once, "
            "to report."
        )
    if protocols == {"best-test"}:
        return (
            "Protocol: best-test, as published. The best evaluation on the TEST split is reported, which is "
            "optimistic: compare it with published tables only."
        )
    return (
        "Protocol: mixed. Some runs chose their weights on validation, others on TEST (optimistic): "
        "do not compare the two."
    )


def _best(table: pd.DataFrame, metric: str) -> str:
    """The best method on test; of several variants of one, validation has chosen before test is looked at."""
    name, higher = metric_name(metric), metrics.metric(metric).higher_is_better
    scored = [row for row in _ok_rows(table) if not math.isnan(row["score_mean"])]
    if not scored:
        return f"No run has a {name} on the test split to report."
    variants = {method: [row for row in scored if row["method"] == method] for method in table["method"].unique()}
    chosen = [_chosen(rows) for rows in variants.values() if rows]
    chosen.sort(key=lambda row: row["score_mean"], reverse=higher)
    most = max(row["n"] for row in chosen)
    place = next(index for index, row in enumerate(chosen) if row["n"] == most)
    better_of_fewer, best, others = chosen[:place], chosen[place], chosen[place + 1 :]
    by = "chosen on validation" if _all_validated(scored) else "the first in the table"
    if len(chosen) == 1:
        several = f" ({by}, of {len(scored)} variants)" if len(scored) > 1 else ""
        return f"{best['label']}{several}: {name} on the test split is {score(best)} ({_seeds(best)})."
    scope = f"with one variant of each method ({by}), " if len(scored) > len(chosen) else ""
    scope += f"of those with {most} seeds, " if better_of_fewer else ""
    level = [row["label"] for row in others if _shown_mean(row) == _shown_mean(best)]
    extreme = f"the {'highest' if higher else 'lowest'} {name} on the test split"
    verb = f"is level with {_listed(_shortened(level))} at" if level else "has"
    told = f"{scope}{best['label']} {verb} {extreme}: {score(best)} ({_seeds(best)})."
    rest = [row for row in others if row["label"] not in level]
    return " ".join([told[:1].upper() + told[1:], *_reservations(best, rest, better_of_fewer)])


def _reservations(best: Row, others: Sequence[Row], better_of_fewer: Sequence[Row]) -> list[str]:
    """What keeps the order from being settled. others: those whose mean is not equal to the best's."""
    told = []
    if better_of_fewer:
        shown = _listed(_shortened([f"{row['label']} ({score(row)}, {_seeds(row)})" for row in better_of_fewer]))
        told.append(f"Better, but of fewer seeds: {shown}.")
    if math.isnan(best["score_std"]):
        return [*told, "One seed shows no spread: the order is not settled."]
    near = _shortened([f"{row['label']} ({score(row)})" for row in others if _overlap(best, row)])
    if near:
        verb = "overlaps" if len(near) == 1 else "overlap"
        told.append(
            f"{_listed(near)} {verb} with it (mean ± std): these runs do not settle the order among them."
        )
    elif others and not better_of_fewer:
        told.append(f"No other mean ± std overlaps with it{_too_few(best)}.")
    return told


def _against(row: Row, other: Row, *, metric: str) -> str:
    """One subject beside one baseline: score, memory, speed."""
    parts = []
    if not (math.isnan(row["score_mean"]) or math.isnan(other["score_mean"])):
        parts.append(_score_difference(row, other, metric))
    memory, other_memory = row["peak_total_mib"], other["peak_total_mib"]
    if memory > 0 and other_memory > 0:
        change = _percent(memory, other_memory, more="more", less="less", equal="equal")
        what = "predicted peak memory" if row["predicted"] else "peak memory"
        parts.append(f"{change} {what} ({size(memory)} against {size(other_memory)} MiB)")
    speed, other_speed = row["images_per_s"], other["images_per_s"]
    if speed > 0 and other_speed > 0:
        change = _percent(speed, other_speed, more="faster", less="slower", equal="equally fast")
        parts.append(f"{change} ({number(speed, digits=0)} against {number(other_speed, digits=0)} images/s)")
    return f"{row['label']} beside {other['label']}: {'; '.join(parts) or 'nothing measured on both'}."


def _score_difference(row: Row, other: Row, metric: str) -> str:
    difference = row["score_mean"] - other["score_mean"]
    amount = number(abs(difference), digits=1 if max(row["score_mean"], other["score_mean"]) >= 10 else 3)
    points = "points " if "%" in metric_name(metric) else ""
    found = f"{amount} {points}{'higher' if difference > 0 else 'lower'}" if float(amount) else "no difference"
    spread = f"do not overlap{_too_few(min(row, other, key=lambda each: each['n']))}"
    if math.isnan(row["score_std"]) or math.isnan(other["score_std"]):
        spread = "unknown: one seed"
    elif _overlap(row, other):
        spread = "overlap, so the difference is not settled"
    return f"{found} in {metric_name(metric)} ({score(row)} against {score(other)}; mean ± std {spread})"


def _variants(spoken_of: Mapping[str, Sequence[Row]]) -> list[str]:
    """Which variant of a method the comparison speaks of, of several. spoken_of: label → the rows it is from."""
    several = []
    for label, rows in sorted(spoken_of.items()):
        if len(rows) > 1:
            by = "the best on validation" if _all_validated(rows) else "the first"
            several.append(f"{label} ({by} of {len(rows)})")
    return [f"Of several variants of a method, these stand for it above: {_listed(several)}."] if several else []


def _predictions(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """How much of the data is the estimator's, and what it says will not fit."""
    predicted = runs.loc[runs["predicted"]]
    if predicted.empty:
        return []
    count = f"{len(predicted)} of {len(runs)}" if len(predicted) < len(runs) else f"All {len(runs)}"
    told = [f"{count} runs are predicted by the estimator; nothing ran, and no score stands behind them."]
    rows = [row["label"] for row in rows_of(table.loc[table["predicted"] & (table["status"] == "oom")])]
    if rows:
        told.append(f"By the estimate these do not fit into the device's memory: {_listed(_shortened(rows))}.")
    return told


def _failures(runs: pd.DataFrame) -> list[str]:
    failed = runs.loc[(runs["status"] != "ok") & ~runs["predicted"]]
    if failed.empty:
        return []
    shown = _listed(_shortened([f"{run['name']}: {run['status']}" for run in rows_of(failed)]))
    count = f"{len(failed)} of {len(runs)} runs did not end well"
    return [f"{count} and {'is' if len(failed) == 1 else 'are'} in no mean above: {shown}."]


def _few_seeds(table: pd.DataFrame) -> list[str]:
    rows = _ok_rows(table)
    most = max((row["n"] for row in rows), default=0)
    fewer = _shortened([f"{row['label']} ({row['n']})" for row in rows if row["n"] < most])
    return [f"Fewer than {most} seeds stand behind {_listed(fewer)}."] if fewer else []


def _copies(runs: pd.DataFrame) -> list[str]:
    """Runs of one row and one seed: the table counts their seed once."""
    folders: dict[tuple[Any, ...], list[str]] = {}
    for run in rows_of(with_labels(runs.loc[runs["compared"]])):
        key = (run["label"], run["status"], run["predicted"], run["seed"])
        folders.setdefault(key, []).append(run["folder"])
    several: dict[str, list[str]] = {}
    for (label, *_, seed), copies in folders.items():
        if len(copies) > 1:
            several.setdefault(label, []).append(f"{seed} ({_listed(_shortened(copies))})")
    return [
        f"Several runs of {label} have the same seed, and their mean stands for it: "
        f"{'; '.join(_shortened(seeds))}."
        for label, seeds in several.items()
    ]


def _unlike(runs: pd.DataFrame) -> list[str]:
    """Settings that differ between compared runs; a fair comparison of methods differs in none."""
    compared = runs.loc[runs["compared"]]
    told = []
    beside = list(runs.loc[~runs["compared"], "name"])
    if beside:
        are = "was found beside the comparison and is" if len(beside) == 1 else "were found beside it and are"
        told.append(f"{_listed(_shortened(beside))} {are} in the list of runs only.")
    varied = varied_keys(compared)
    for setting in FIELDS:
        values = sorted(set(field_texts(compared, setting)))
        by = _STUDIED_BY.get(setting, f"varied.{setting}.name")
        is_studied = any(key.endswith(f".{setting}") or key.startswith(by) for key in varied)
        if len(values) > 1 and not is_studied:
            told.append(
                f"Mind that {setting} differs between the compared runs: {', '.join(_shortened(values))}."
            )
    return told


def _alike(rows: Sequence[Row], row: Row) -> list[Row]:
    """Those whose settings are `row`'s: one of another model or engine says nothing about the method."""
    return [other for other in rows if all(other[name] == row[name] for name in SETTINGS)]


def _chosen(rows: Sequence[Row]) -> Row:
    """The row that stands for its method: of those with most seeds what validation (never test) ranks first."""
    most = max(row["n"] for row in rows)
    rows = [row for row in rows if row["n"] == most]
    if _all_validated(rows):
        higher = metrics.metric(rows[0]["metric"] or "score").higher_is_better
        return max(rows, key=lambda row: row["validation_score"] if higher else -row["validation_score"])
    return rows[0]


def _ok_rows(table: pd.DataFrame, method: str | None = None) -> list[Row]:
    return [row for row in rows_of(table) if row["status"] == "ok" and method in (None, row["method"])]


def _all_validated(rows: Sequence[Row]) -> bool:
    return not any(math.isnan(row["validation_score"]) for row in rows)


def _overlap(row: Row, other: Row) -> bool:
    """Whether the intervals mean ± std touch; an unknown spread counts as none."""
    spread = sum(0.0 if math.isnan(r["score_std"]) else r["score_std"] for r in (row, other))
    return abs(row["score_mean"] - other["score_mean"]) <= spread


def _too_few(row: Row) -> str:
    """The reservation that a sign-flip test of so many seeds cannot come out below 0.05."""
    return f", but {row['n']} seeds are too few for a sign-flip test" if smallest_flip_p(row["n"]) > ALPHA else ""


def _shown_mean(row: Row) -> str:
    return mean_and_std(row["score_mean"], math.nan)


def _seeds(row: Row) -> str:
    return (
        f"seed {row['seeds']}"
        if row["n"] == 1
        else f"{row['n']} seeds: {', '.join(_shortened(row['seeds'].split()))}"
    )


def _percent(value: float, base: float, *, more: str, less: str, equal: str) -> str:
    change = 100 * (value / base - 1)
    amount = f"{abs(change):.{0 if abs(change) >= 10 else 1}f}"
    return f"{amount} % {more if change > 0 else less}" if float(amount) else equal


def _shortened(items: Sequence[str]) -> list[str]:
    """The first of many, and how many more there are."""
    return list(items) if len(items) <= _MOST_NAMED else [*items[:5], f"{len(items) - 5} more"]


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
