"""A small study, and the records of runs that have ended."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from snell_scale import registry
from snell_scale.attempt import blank_result
from snell_scale.compare import PlannedRun, plan_study
from snell_scale.config import to_dict
from snell_scale.records import Status, write_result, write_yaml

Call = Callable[..., tuple[int, str, str]]


def plan(tiny_file: Path, seeds: int = 4) -> list[PlannedRun]:
    grid = {"seeds": list(range(seeds))}
    return plan_study([tiny_file], grid=grid, overrides=[], name="s", config_class=registry.config_class)


def folder_of(run: PlannedRun) -> Path:
    return Path(run.config.output_dir) / run.config.name


def record(run: PlannedRun, status: Status) -> None:
    """What a run that ended so has left."""
    write_yaml(folder_of(run) / "config.yaml", to_dict(run.config))
    write_result(folder_of(run), replace(blank_result(run.config, run.varied), status=status))
