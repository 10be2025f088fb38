"""The part of a report that a reader works with: plots and the table of every run, under one filter."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.drawing import Picture
from analysis.groups import choice_of, is_number, method_name, metric_name, metric_of, value_text
from analysis.load import Row, rows_of
from analysis.report_page.commands import code_of, command_of
from analysis.report_page.page import (
    Cell,
    Section,
    filter_form,
    paragraph,
    plot,
    sortable_table,
    steps,
    subheading,
)
from analysis.report_page.plot_data import facets_of, further_figures, further_keys, plot_kinds
from analysis.tables import number, size, source
from snell_scale import metrics

_PAGE_SIZE = 100  # rows; a browser lays out more of them too slowly to sort and filter at once
_TITLES = {"scatter": "Runs", "bars": "Peak memory by category", "curves": "Training"}
_HOW = (
    "The legend switches series off and on. A pointer on a plot, or the arrow keys when it has the focus, reads "
    "its values. Plots and table show the runs that the filter lets through."
)
_REPRODUCE = (
    "Check out the commit in the run's row (git checkout COMMIT). “+ changes” says that files differed from it: "
    "what they held is not recorded.",
    "make setup installs the versions of that commit's requirements.lock; Environment lists those that ran.",
    "Start the row's command from the folder where the run was started: paths in its config.yaml are relative to "
    "that. output_dir=again puts the new run beside the old one. launch/torchrun.sh as given is for one machine; "
    "for several, see launch/torchrun.sh --help. The command of an estimate finds its memory again; whether that "
    "fits is asked with --device-memory.",
)
# Beside these the varied keys, and what is in every table.
_SETTINGS = {
    "model": "Model",
    "engine": "Engine",
    "world_size": "Ranks",
    "dataset": "Dataset",
    "precision": "Precision",
}


def explore_section(
    runs: pd.DataFrame, environments: pd.DataFrame, data: Mapping[str, Any], pictures: Mapping[str, Picture]
) -> Section:
    """data: of `plot_data`. pictures: what stands for a kind of plot where scripts do not run."""
    choices = {key: (heading, _in_order(runs[key], texts)) for key, (heading, texts) in facets_of(runs).items()}
    captions = _captions(runs)
    plots = "".join(
        plot(kind, pictures.get(kind), title=_TITLES[kind], caption=captions[kind]) for kind in plot_kinds(data)
    )
    legend = '<div class="legend" role="group" aria-label="Series shown in the plots"></div>'
    body = (
        filter_form("runs-table", choices)
        + (f'{paragraph(_HOW, kind="note")}{legend}<div class="figures">{plots}</div>' if plots else "")
        + subheading("runs", "Every run")
        + runs_table(runs, environments)
        + subheading("reproduce", "How to make a run again")
        + steps(_REPRODUCE)
    )
    parts = (("runs", "Every run"), ("reproduce", "How to make a run again"))
    return Section("plots", "Plots and runs", body, parts)


def _captions(runs: pd.DataFrame) -> dict[str, str]:
    has_score = runs["score"].notna().any()
    better = "Up" if metrics.metric(metric_of(runs)).higher_is_better else "Down"
    hint = f" {better} and to the left is better where they are score and memory." if has_score else ""
    sources = ", ".join(sorted(set(runs["memory_source"].dropna())))
    counted = f" Memory as counted from {sources}." if sources else ""
    return {
        "scatter": f"Every shown run is a point; choose what stands on the axes.{hint}{counted}",
        "bars": f"What stands in memory at the peak of a training step.{counted}",
        "curves": "Evaluations during training of the runs that ended well.",
    }


def runs_table(runs: pd.DataFrame, environments: pd.DataFrame) -> str:
    """Every run, however it ended, with the command that makes it again. environments: of `load_environments`."""
    metric, choice, further = metric_of(runs), choice_of(runs), further_figures(runs)
    keys = [*further_keys(runs, _SETTINGS), *(key for key in _SETTINGS if runs[key].nunique() > 1)]
    kinds = {key: _kind(runs[key]) for key in keys}
    ran_on = {index: row for index, row in zip(environments.index, rows_of(environments), strict=True)}
    headings = [Cell("Run"), Cell("Method"), Cell("Status")]
    headings += [Cell("Source")] if runs["predicted"].any() else []
    headings += [Cell("Seed", kind="number"), *(Cell(_heading(key), kind=kind) for key, kind in kinds.items())]
    scores = (f"Test {metric_name(metric)}", f"Validation {metric_name(choice)}")
    numbers = (*scores, "Best step", "Peak MiB", "Images/s", "Seconds", *further.values())
    headings += [*(Cell(heading, kind="number") for heading in numbers), Cell("Code"), Cell("Command")]
    caption = (
        "Every run that was read, with the command that makes it again. A dash: not measured, or ended before. "
        "A heading sorts."
    )
    rows = [
        _run_cells(_with_scores_of(run, metric, choice), runs, kinds, list(further), ran_on.get(index, {}))
        for index, run in zip(runs.index, rows_of(runs), strict=True)
    ]
    return sortable_table("runs-table", caption, headings, rows, page_size=_PAGE_SIZE)


def _with_scores_of(run: Row, metric: str, choice: str) -> Row:
    """A run beside the comparison may have been judged by other metrics: in these it has no score."""
    own = {} if run["headline"] == metric else {"score": float("nan")}
    return {**run, **own, **({} if run["metric"] == choice else {"validation_score": float("nan")})}


def _run_cells(
    run: Row, runs: pd.DataFrame, keys: Mapping[str, str], further: Sequence[str], environment: Mapping[str, Any]
) -> list[Cell]:
    message = run["message"] if isinstance(run["message"], str) else None
    best_step = float("nan") if pd.isna(run["best_step"]) else float(run["best_step"])
    code, command = code_of(environment), command_of(run, environment)
    where = source(run["predicted"])
    return [
        Cell(run["name"], run["name"]),
        Cell(method_name(run["method"]), run["method"]),
        Cell(run["status"], run["status"], kind="" if run["status"] == "ok" else "bad", detail=message),
        *([Cell(where, where)] if runs["predicted"].any() else []),
        Cell(str(run["seed"]), run["seed"], kind="number"),
        *(_varied_cell(run[key], kind=kind) for key, kind in keys.items()),
        Cell(number(run["score"], digits=2), run["score"], kind="number"),
        Cell(number(run["validation_score"], digits=2), run["validation_score"], kind="number"),
        Cell(number(best_step, digits=0), best_step, kind="number"),
        Cell(size(run["peak_total_mib"]), run["peak_total_mib"], kind="number"),
        Cell(number(run["images_per_s"], digits=0), run["images_per_s"], kind="number"),
        Cell(number(run["seconds_total"], digits=1), run["seconds_total"], kind="number"),
        *(Cell(_figure(run[key]), run[key], kind="number") for key in further),
        Cell(code or "–", code, kind="code" if code else ""),
        Cell(command or "no config.yaml", command, kind="code" if command else ""),
    ]


def _figure(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:,.3g}" if abs(value) < 100 else size(value)


def _heading(key: str) -> str:
    return _SETTINGS.get(key, key.removeprefix("varied."))


def _kind(values: pd.Series) -> str:
    return "number" if values.dropna().map(is_number).all() else ""


def _varied_cell(value: Any, *, kind: str) -> Cell:
    return Cell("–", None, kind=kind) if pd.isna(value) else Cell(value_text(value), value, kind=kind)


def _in_order(values: pd.Series, texts: pd.Series) -> list[str]:
    """The options of a choice: numbers by size, then words."""
    found = dict(zip(texts, values, strict=True))
    return sorted(
        found, key=lambda text: (not is_number(found[text]), found[text] if is_number(found[text]) else 0, text)
    )
