"""Several runs as one study: every combination of a grid, in parallel processes, skipping what is done."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snell_scale.config import STUDY_KEYS, Config, ConfigClassLookup, resolve
from snell_scale.config_sources import parse_value, read_yaml
from snell_scale.records import Result, write_result
from snell_scale.worker_pool import WorkerPool

GRID_ALIASES = {
    "methods": "method.name",
    "models": "model.architecture",
    "engines": "engine.name",
    "seeds": "seed",
}
# In the names of folders.
_BARE_KEYS = ("config", "case", "model.architecture")
_SHORT_KEYS = {"batch_size": "batch"}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study and what sets it apart from the others."""

    config: Config
    varied: Mapping[str, Any]


def plan_study(
    paths: Sequence[Path],
    *,
    grid: Mapping[str, Sequence[Any]],
    overrides: Sequence[str],
    name: str | None,
    config_class: ConfigClassLookup,
) -> list[PlannedRun]:
    """Every run of the study, validated before the first one starts.

    grid: dotted key → values; it is laid over the file's own `grid:`. Several files, or the ones that a file's
    `configs:` lists, are compared with one another, each under the whole grid. ValueError for any mistake, and
    where two runs would share a folder.
    """
    study = name or "-".join(path.stem for path in paths)
    planned: list[PlannedRun] = []
    paths, grid = _listed(paths, grid)
    for path in paths:
        raw = read_yaml(path)
        sections = {key: raw.pop(key, None) or {} for key in STUDY_KEYS}
        full_grid = _aliased(sections["grid"]) | _aliased(grid)
        for case, changes in sections["cases"].items() or [(None, {})]:
            for values in itertools.product(*full_grid.values()):
                varied: dict[str, Any] = {"config": path.stem} if len(paths) > 1 else {}
                if case is not None:
                    varied["case"] = case
                varied |= dict(zip(full_grid, values, strict=True))
                settings = {**changes, **dict(zip(full_grid, values, strict=True))}
                texts = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
                run_name = f"name={study}/{_label(varied)}"
                config = resolve(raw, [*texts, run_name], config_class=config_class, source=str(path))
                planned.append(PlannedRun(config, varied))
    _check_distinct(planned)
    return planned


def is_study(path: Path) -> bool:
    """Whether a config file stands for several runs. ValueError where it cannot be read."""
    return any(key in read_yaml(path) for key in (*STUDY_KEYS, "configs"))


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """ "methods=lora,snell" → ("methods", ["lora", "snell"]); values in [brackets] are read as one YAML list."""
    key, sign, value = text.partition("=")
    if not sign or not key or not value:
        raise ValueError(f"--grid {text!r} is not of the form key=value,value, e.g. seeds=0,1,2")
    if value.startswith("["):
        return key, list(parse_value(value))
    return key, [parse_value(part) for part in value.split(",")]


def run_study(
    planned: Sequence[PlannedRun], *, num_jobs: int, finished: Callable[[PlannedRun, Result], None]
) -> list[Result]:
    """Run them, `num_jobs` at a time, each job with its share of the cores; results in the order planned.

    A run that has a result is not run again, an interrupted one continues. A run that fails, or whose process
    dies, is a "failed" result, recorded in its folder: the others go on.
    KeyboardInterrupt (SIGINT or SIGTERM): the runs under way have saved; the same call continues them.
    """
    results: dict[int, Result] = {}
    for index, outcome in WorkerPool(_execute, num_workers=num_jobs).outcomes(planned):
        run = planned[index]
        result = outcome if isinstance(outcome, Result) else _record_failure(run, outcome)
        results[index] = result
        finished(run, result)
    return [results[index] for index in sorted(results)]


def _listed(
    paths: Sequence[Path], grid: Mapping[str, Sequence[Any]]
) -> tuple[Sequence[Path], Mapping[str, Sequence[Any]]]:
    """A file of `configs:` and `grid:` stands for the files that it lists (relative to it), under its grid."""
    raw = read_yaml(paths[0]) if len(paths) == 1 else {}
    if "configs" not in raw:
        return paths, grid
    unknown = sorted(raw.keys() - {"configs", "grid"})
    if unknown or not isinstance(raw["configs"], list) or not raw["configs"]:
        raise ValueError(
            f"{paths[0]} lists configs, beside which only grid: can stand, but has "
            f"{', '.join(unknown) or 'none in the list'}"
        )
    listed = [paths[0].parent / str(config) for config in raw["configs"]]
    return listed, _aliased(raw.get("grid") or {}) | _aliased(grid)


def _execute(planned: PlannedRun) -> Result:
    from snell_scale.run import run

    result = run(planned.config, resume="auto", varied=planned.varied, quiet=True)
    if result.status == "interrupted":
        os._exit(1)  # the study was stopped: this worker must not wait for another run
    return result


def _record_failure(planned: PlannedRun, error: BaseException) -> Result:
    from snell_scale.attempt import blank_result

    died = "its process died (killed, or out of host memory?)" if isinstance(error, BrokenProcessPool) else None
    message = died or f"{type(error).__name__}: {error}"
    result = blank_result(planned.config, planned.varied, message=message)
    folder = Path(planned.config.output_dir) / planned.config.name
    # A folder that holds another run keeps its own record.
    if not (folder / "result.json").exists():
        write_result(folder, result)
    return result


def _aliased(grid: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"grid.{key} is {values!r}, expected a list of at least one value")
    return {GRID_ALIASES.get(key, key): list(values) for key, values in grid.items()}


def _label(varied: Mapping[str, Any]) -> str:
    """A folder name from what varies: bare where the value is a name itself, with its key for the rest."""
    parts = []
    for key, value in varied.items():
        last = key.split(".")[-1]
        is_bare = key in _BARE_KEYS or last == "name"
        parts.append(str(value) if is_bare else f"{_SHORT_KEYS.get(last, last)}{value}")
    return "-".join(part.replace("/", "_").replace(" ", "") for part in parts) or "run"


def _check_distinct(planned: Sequence[PlannedRun]) -> None:
    names = [run.config.name for run in planned]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(
            f"two runs of the study would share the folder {double[0]}: name each case and file once"
        )
