"""Which learning rate is each method's best, judged on validation data: `python -m analysis.tuning RUNS`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.groups import choice_of
from analysis.load import load_runs
from snell_scale import metrics

_KEY = "varied.training.lr"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, per method, the mean validation score of every learning rate and the best of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of a study that varies training.lr.")
    rates = best_learning_rates(load_runs(parser.parse_args(arguments).runs))
    table = Table(*rates.columns, title="Mean validation score per learning rate")
    for row in rates.itertuples(index=False):
        table.add_row(*map(str, row))
    Console().print(table)


def best_learning_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method: mean validation score (over seeds) at every learning rate, and the best rate.

    A rate at which any seed did not end "ok" cannot be the best: its mean would be over the lucky ones only.
    At equal scores the smaller rate is named. ValueError if no run varies training.lr.
    """
    if _KEY not in runs:
        raise ValueError("no run varies training.lr; give the folder of a study with training.lr in its grid")
    choice = metrics.metric(choice_of(runs))
    scores = runs["validation_score"].where(runs["status"] == "ok")
    table = (
        runs.assign(score=scores)
        .groupby(["method", _KEY])["score"]
        .agg(lambda column: column.mean(skipna=False))
        .unstack(_KEY)
        .sort_index(axis=1)
    )
    rates = [f"{rate:g}" for rate in table.columns]
    digits = choice.digits + 1
    shown = table.map(lambda value: "–" if pd.isna(value) else f"{value:.{digits}f}").set_axis(rates, axis=1)
    shown["best"] = [_best(scores, rates, higher=choice.higher_is_better) for scores in table.to_numpy().tolist()]
    return shown.rename_axis("method").reset_index()


def _best(scores: list[float], rates: list[str], *, higher: bool) -> str:
    sign = 1 if higher else -1
    usable = [(sign * score, -index) for index, score in enumerate(scores) if not math.isnan(score)]
    return rates[-max(usable)[1]] if usable else "–"


if __name__ == "__main__":
    main()
