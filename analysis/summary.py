"""What the data say, in sentences: made from the comparison's numbers, and honest about their spread."""

import itertools
import json
import math
from collections.abc import Collection, Sequence

import pandas as pd

from analysis.groups import SETTINGS, metric_name, metric_of, varied_keys
from analysis.load import Row, rows_of
from analysis.tables import number, score, size
from snell_scale import metrics

_SUBJECTS = ("snell", "snella")
_BASELINES = ("lora", "full")


def sentences(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """The best method, SNELL and SNELLA beside LoRA and full fine-tuning, then whatever limits these."""
    metric = metric_of(runs)
    pairs = []
    for subject, baseline in itertools.product(_SUBJECTS, _BASELINES):
        row, other = _chosen(table, subject), _chosen(table, baseline)
        if row is not None and other is not None:
            pairs.append((row, other))
    told = [_best(table, metric), *(_against(row, other, metric=metric) for row, other in pairs)]
    spoken_of = {row["method"] for pair in pairs for row in pair}
    return told + _variants(table, spoken_of) + _failures(runs) + _few_seeds(table) + _unlike(runs)


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
    ranked = [row for row in _ok_rows(table) if not math.isnan(row["score_mean"])]
    higher = metrics.metric(metric).higher_is_better
    ranked.sort(key=lambda row: row["score_mean"], reverse=higher)
    name = metric_name(metric)
    if not ranked:
        return f"No run has a {name} on the test split to report."
    best, *others = ranked
    if not others:
        return f"{best['label']}: {name} on the test split is {score(best)} ({_seeds(best)})."
    subject = best["label"][:1].upper() + best["label"][1:]
    extreme = "highest" if higher else "lowest"
    told = f"{subject} has the {extreme} {name} on the test split: {score(best)} ({_seeds(best)})."
    if math.isnan(best["score_std"]):
        return f"{told} One seed shows no spread: the order is not settled."
    near = [f"{row['label']} ({score(row)})" for row in others if _overlap(best, row)]
    if not near:
        return f"{told} No other mean ± std overlaps with it."
    verb = "overlaps" if len(near) == 1 else "overlap"
    return f"{told} {_listed(near)} {verb} with it (mean ± std): these runs do not settle the order among them."


def _against(row: Row, other: Row, *, metric: str) -> str:
    """One subject beside one baseline: score, memory, speed."""
    parts = []
    if not (math.isnan(row["score_mean"]) or math.isnan(other["score_mean"])):
        parts.append(_score_difference(row, other, metric))
    memory, other_memory = row["peak_total_mib"], other["peak_total_mib"]
    if memory > 0 and other_memory > 0:
        change = _percent(memory, other_memory, more="more", less="less", equal="equal")
        parts.append(f"{change} peak memory ({size(memory)} against {size(other_memory)} MiB)")
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
    spread = "do not overlap"
    if math.isnan(row["score_std"]) or math.isnan(other["score_std"]):
        spread = "unknown: one seed"
    elif _overlap(row, other):
        spread = "overlap, so the difference is not settled"
    return f"{found} in {metric_name(metric)} ({score(row)} against {score(other)}; mean ± std {spread})"


def _variants(table: pd.DataFrame, methods: Collection[str]) -> list[str]:
    """Which variant of a method the comparison speaks of, where there are several."""
    several = []
    for method in sorted(methods):
        rows, chosen = _ok_rows(table, method), _chosen(table, method)
        if len(rows) > 1 and chosen is not None:
            by = "the best on validation" if _all_validated(rows) else "the first"
            several.append(f"{chosen['label']} ({by} of {len(rows)})")
    return [f"Of several variants of a method, these stand for it above: {_listed(several)}."] if several else []


def _failures(runs: pd.DataFrame) -> list[str]:
    failed = runs.loc[runs["status"] != "ok"]
    if failed.empty:
        return []
    told = [f"{run['name']}: {run['status']}" for run in rows_of(failed)]
    shown = _listed(told if len(told) <= 6 else [*told[:5], f"{len(told) - 5} more"])
    count = f"{len(failed)} of {len(runs)} runs did not end well"
    return [f"{count} and {'is' if len(failed) == 1 else 'are'} in no mean above: {shown}."]


def _few_seeds(table: pd.DataFrame) -> list[str]:
    rows = _ok_rows(table)
    most = max((row["n"] for row in rows), default=0)
    fewer = [f"{row['label']} ({row['n']})" for row in rows if row["n"] < most]
    return [f"Fewer than {most} seeds stand behind {_listed(fewer)}."] if fewer else []


def _unlike(runs: pd.DataFrame) -> list[str]:
    """Settings that differ between compared runs; a fair comparison of methods differs in none."""
    compared = runs.loc[runs["compared"]]
    told = []
    beside = list(runs.loc[~runs["compared"], "name"])
    if beside:
        are = "was found beside the comparison and is" if len(beside) == 1 else "were found beside it and are"
        told.append(f"{_listed(beside)} {are} in the list of runs only.")
    varied = varied_keys(compared)
    for setting in SETTINGS:
        values = sorted({str(value) for value in compared[setting]})
        section = "data" if setting == "dataset" else setting
        is_studied = any(key.endswith(f".{setting}") or key == f"varied.{section}.name" for key in varied)
        if len(values) > 1 and not is_studied:
            told.append(f"Mind that {setting} differs between the compared runs: {', '.join(values)}.")
    return told


def _chosen(table: pd.DataFrame, method: str) -> Row | None:
    """The row that stands for a method: of several, the one that validation (never test) ranks first."""
    rows = _ok_rows(table, method)
    if rows and _all_validated(rows):
        higher = metrics.metric(rows[0]["metric"] or "score").higher_is_better
        return max(rows, key=lambda row: row["validation_score"] if higher else -row["validation_score"])
    return rows[0] if rows else None


def _ok_rows(table: pd.DataFrame, method: str | None = None) -> list[Row]:
    return [row for row in rows_of(table) if row["status"] == "ok" and method in (None, row["method"])]


def _all_validated(rows: Sequence[Row]) -> bool:
    return not any(math.isnan(row["validation_score"]) for row in rows)


def _overlap(row: Row, other: Row) -> bool:
    """Whether the intervals mean ± std touch; an unknown spread counts as none."""
    spread = sum(0.0 if math.isnan(r["score_std"]) else r["score_std"] for r in (row, other))
    return abs(row["score_mean"] - other["score_mean"]) <= spread


def _seeds(row: Row) -> str:
    return f"seed {row['seeds']}" if row["n"] == 1 else f"{row['n']} seeds: {row['seeds'].replace(' ', ', ')}"


def _percent(value: float, base: float, *, more: str, less: str, equal: str) -> str:
    change = 100 * (value / base - 1)
    amount = f"{abs(change):.{0 if abs(change) >= 10 else 1}f}"
    return f"{amount} % {more if change > 0 else less}" if float(amount) else equal


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
