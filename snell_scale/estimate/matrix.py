"""Estimates of many runs: methods × models × engines × world sizes, each a record that analysis reads."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snell_scale.compare import PlannedRun, plan_study
from snell_scale.config import ConfigClassLookup
from snell_scale.estimate.prediction import Estimator, microbatch_of
from snell_scale.estimate.record import as_result, write_estimate
from snell_scale.estimate.settings import Settings
from snell_scale.records import Result
from snell_scale.worker_pool import WorkerPool

WORLD_SIZE = "world_size"


@dataclass(frozen=True)
class Cell:
    """One estimate of the matrix."""

    planned: PlannedRun
    world_size: int
    settings: Settings


def plan_matrix(
    paths: Sequence[Path],
    *,
    grid: Mapping[str, Sequence[Any]],
    overrides: Sequence[str],
    name: str,
    settings: Settings,
    config_class: ConfigClassLookup,
) -> list[Cell]:
    """Every combination, checked. grid: dotted key → values; "world_size" is a key of its own.

    ValueError for a mistake in any config, or a world size that is no number above 0.
    """
    grid = dict(grid)
    world_sizes = grid.pop(WORLD_SIZE, [1])
    for size in world_sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"world_size is {size!r}, expected whole numbers of ranks, e.g. world_size=1,8,64")
    runs = plan_study(paths, grid=grid, overrides=overrides, name=name, config_class=config_class)
    return [
        Cell(_on_ranks(run, size, is_varied=len(world_sizes) > 1), size, settings)
        for run, size in itertools.product(runs, world_sizes)
    ]


def run_matrix(
    cells: Sequence[Cell], *, num_jobs: int, finished: Callable[[PlannedRun, Result], None]
) -> tuple[list[Result], list[str]]:
    """(the estimates in the order planned, why others were refused). Every estimate is written as it is made."""
    results: dict[int, Result] = {}
    refused = []
    for index, outcome in WorkerPool(estimate_cell, num_workers=num_jobs).outcomes(cells):
        if isinstance(outcome, Result):
            results[index] = outcome
            finished(cells[index].planned, outcome)
        else:
            kind = "" if isinstance(outcome, ValueError) else f"{type(outcome).__name__}: "
            refused.append(f"{cells[index].planned.config.name}: {kind}{outcome}")
    return [results[index] for index in sorted(results)], refused


def estimate_cell(cell: Cell) -> Result:
    """Estimate, and write the record. ValueError where there is no such run."""
    config, settings = cell.planned.config, cell.settings
    microbatch = settings.microbatch_size or microbatch_of(config, cell.world_size)
    with Estimator(config, cell.world_size, settings.num_classes, settings.target) as estimator:
        prediction = estimator.predict(microbatch)
    result = as_result(prediction, config, varied=cell.planned.varied, limit_bytes=settings.limit_bytes)
    write_estimate(result, config)
    return result


def _on_ranks(run: PlannedRun, world_size: int, *, is_varied: bool) -> PlannedRun:
    if not is_varied:
        return run
    config = run.config.model_copy(update={"name": f"{run.config.name}-{world_size}ranks"})
    return PlannedRun(config, {**run.varied, WORLD_SIZE: world_size})
