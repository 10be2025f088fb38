"""Methods × tasks of VTAB-1k and FGVC, published means too: `python -m analysis.transfer RUNS --output DIR`."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.benchmarks import BENCHMARKS, Benchmark
from analysis.groups import METHOD_NAMES, method_name, value_text, varied_keys
from analysis.load import Row, load_runs, rows_of
from analysis.tables import Column, mean_and_std, print_table, write_tables

_SCORE = "test_top1"
_PUBLISHED = "published (best test epoch)"
_PROTOCOLS = {"validation": "here (validation chooses)", "best-test": "here (best test epoch)"}
# These tell tasks apart, not rows of one task.
_TASK_KEYS = ("varied.config", "varied.case", "varied.data.task", "varied.data.set")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write, print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.transfer", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders above them")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the tables go")
    options = parser.parse_args(arguments)
    try:
        written = write_transfer(load_runs(options.runs), options.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in written))
    return 0


def write_transfer(runs: pd.DataFrame, output: Path) -> list[Path]:
    """Write <benchmark>.md, .csv and .tex for every benchmark that has runs, and print what they sum up to.

    ValueError: no run of either benchmark, or two runs of the same row, task and seed.
    """
    paths: list[Path] = []
    for benchmark in BENCHMARKS:
        table = transfer_table(runs, benchmark)
        if table.empty:
            continue
        shown = _columns(benchmark)
        paths += write_tables(table, shown, output, name=benchmark.name)
        notes = _notes(benchmark)
        with (output / f"{benchmark.name}.md").open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(f"- {note}" for note in notes) + "\n")
        summary = [column for column in shown if column.key.removesuffix("_mean") not in benchmark.tasks]
        print_table(table, summary, title=f"{benchmark.title}: top-1 %, mean ± standard deviation over seeds")
    if not paths:
        names = " or ".join(f"{benchmark.name}/…" for benchmark in BENCHMARKS)
        raise ValueError(
            f"no run has a data set named {names} in its record; give the runs of configs/vtab or configs/fgvc"
        )
    return paths


def transfer_table(runs: pd.DataFrame, benchmark: Benchmark) -> pd.DataFrame:
    """One row per method (and what else differs on one task), then the published ones; empty without runs.

    Columns: label, source, status, n (seeds), tasks (complete ones), <task>_mean, _std, _state, the same of every
    named group, of "groups" (mean of the groups' means) and of "all" (mean of the tasks). A task in which a run
    did not end "ok" has a state instead of a mean. Means are formed of complete sets only; their spread is over
    the seeds that have every task.
    """
    prefix = f"{benchmark.name}/"
    own = runs.loc[runs["dataset"].isin([prefix + task for task in benchmark.tasks])]
    if own.empty:
        return pd.DataFrame()
    own = own.assign(task=own["dataset"].str.removeprefix(prefix))
    if _SCORE not in own:
        own = own.assign(**{_SCORE: math.nan})
    own = own.assign(row=_rows_of(own))
    _check_once(own)
    rows = [_own_row(group, benchmark) for _, group in own.groupby("row", sort=False)]
    rows.sort(key=lambda row: (_rank(row["method"]), row["label"], row["source"]))
    return pd.DataFrame(rows + [_published_row(benchmark, p.method, p.mean) for p in benchmark.published])


def _rows_of(runs: pd.DataFrame) -> pd.Series:
    """Each run's row as (label, source): its method, model, protocol, and the keys that differ on one task."""
    keys = [key for key in varied_keys(runs) if key not in _TASK_KEYS]
    same = runs.groupby(["method", "task"], dropna=False)
    keys = [key for key in keys if (same[key].nunique(dropna=False) > 1).any()]
    several_models = runs["model"].nunique() > 1
    names = []
    for run in rows_of(runs):
        parts = [method_name(str(run["method"]))]
        parts += [f"{key.rsplit('.', 1)[-1]}={value_text(run[key])}" for key in keys if not pd.isna(run[key])]
        parts += [str(run["model"])] if several_models else []
        names.append((", ".join(parts), _PROTOCOLS[run["protocol"]]))
    return pd.Series(names, index=runs.index, dtype=object)


def _check_once(runs: pd.DataFrame) -> None:
    seen: dict[tuple[str, str, int], str] = {}
    for run in rows_of(runs):
        key = (run["row"], run["task"], run["seed"])
        if key in seen:
            raise ValueError(
                f"two runs of {run['row'][0]} on {run['task']} have seed {run['seed']}: {seen[key]} and "
                f"{run['folder']}; give one of them"
            )
        seen[key] = run["folder"]


def _own_row(runs: pd.DataFrame, benchmark: Benchmark) -> Row:
    label, source = runs["row"].iloc[0]
    # Tasks × seeds; a run that did not end well leaves its task without a mean.
    scores = runs.pivot(index="task", columns="seed", values=_SCORE).reindex(list(benchmark.tasks))
    row: Row = {"label": label, "method": str(runs["method"].iloc[0]), "source": source, "status": "ok"}
    complete = []
    for task in benchmark.tasks:
        of_task = runs.loc[runs["task"] == task]
        ended = of_task["status"] == "ok"
        is_whole = bool(len(of_task)) and bool(ended.all()) and bool(of_task[_SCORE].notna().all())
        complete += [task] * is_whole
        row[f"{task}_mean"] = of_task[_SCORE].mean() if is_whole else math.nan
        row[f"{task}_std"] = of_task[_SCORE].std(ddof=1) if is_whole else math.nan
        row[f"{task}_state"] = "" if is_whole else _state(of_task["status"])
    row["n"] = _range([int((runs["task"] == task).sum()) for task in complete])
    row["tasks"] = f"{len(complete)}/{len(benchmark.tasks)}"
    for name, tasks in benchmark.groups.items():
        if name:
            row |= _mean_of(scores, [list(tasks)], complete, name)
    groups = [list(tasks) for tasks in benchmark.groups.values()]
    row |= _mean_of(scores, groups, complete, "groups")
    return row | _mean_of(scores, [list(benchmark.tasks)], complete, "all")


def _mean_of(scores: pd.DataFrame, groups: list[list[str]], complete: list[str], name: str) -> Row:
    """Mean of the groups' means, of the tasks' means over seeds; NaN unless every task is complete."""
    if not {task for group in groups for task in group} <= set(complete):
        return {f"{name}_mean": math.nan, f"{name}_std": math.nan}
    of_tasks = scores.mean(axis=1)
    mean = sum(of_tasks.loc[group].mean() for group in groups) / len(groups)
    of_seeds = [scores.loc[group].mean(axis=0, skipna=False) for group in groups]
    spread = (sum(of_seeds[1:], of_seeds[0]) / len(groups)).std(ddof=1)
    return {f"{name}_mean": float(mean), f"{name}_std": float(spread)}


def _published_row(benchmark: Benchmark, method: str, mean: float) -> Row:
    row: Row = {"label": method, "method": "", "source": _PUBLISHED, "status": "ok", "n": "–", "tasks": "–"}
    names = [*benchmark.tasks, *filter(None, benchmark.groups), "groups", "all"]
    row |= {f"{name}_{figure}": math.nan for name in names for figure in ("mean", "std")}
    row |= {f"{task}_state": "" for task in benchmark.tasks}
    row["groups_mean"] = mean
    return row


def _columns(benchmark: Benchmark) -> list[Column]:
    shown = [
        Column("Method", "label", lambda row: row["label"], is_number=False),
        Column("Source", "source", lambda row: row["source"], is_number=False),
        Column("Seeds", "n", lambda row: row["n"]),
        Column("Tasks", "tasks", lambda row: row["tasks"]),
    ]
    for name, tasks in benchmark.groups.items():
        shown += [_figure(heading, task) for task, heading in tasks.items()]
        shown += [_figure(f"{name} mean", name)] if name else []
    shown.append(_figure(benchmark.mean, "groups"))
    if len(benchmark.groups) > 1:
        shown.append(_figure(f"Mean of {len(benchmark.tasks)} tasks", "all"))
    return shown


def _figure(heading: str, name: str) -> Column:
    def text(row: Row) -> str:
        return row.get(f"{name}_state") or mean_and_std(row[f"{name}_mean"], row[f"{name}_std"])

    return Column(heading, f"{name}_mean", text)


def _notes(benchmark: Benchmark) -> list[str]:
    notes = [
        "Top-1 % on the test images: mean ± sample standard deviation over seeds; – is not there, and a mean is "
        "formed of a complete set of tasks only.",
        f'"{_PROTOCOLS["validation"]}": validation images chose the epoch, test images reported it once. '
        f'"{_PUBLISHED}": the best epoch on the test images themselves, which is optimistic; compare with rows '
        f'"{_PROTOCOLS["best-test"]}" only. Published numbers: arXiv 2411.01800, 2510.24037 and what they cite.',
    ]
    if len(benchmark.groups) > 1:
        groups = "; ".join(f"{name}: {', '.join(tasks.values())}" for name, tasks in benchmark.groups.items())
        notes.append(f"{benchmark.mean}: the mean of the groups' means, each group counting alike ({groups}).")
    return notes


def _state(statuses: pd.Series) -> str:
    """Why a task has no mean: "–" for no run, or how many ended how."""
    counts = statuses.value_counts()
    return ", ".join(f"{count} {status}" for status, count in counts.items()) if len(counts) else "–"


def _range(counts: list[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}–{high}"


def _rank(method: str) -> int:
    names = list(METHOD_NAMES)
    return names.index(method) if method in names else len(names)


if __name__ == "__main__":
    sys.exit(main())
