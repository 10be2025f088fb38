"""Run folders → one tidy DataFrame with one row per run, and one with the evaluations during training."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from snell_scale.records import MEMORY_CATEGORIES, Result, read_result, read_steps

MIB = 2**20
Row: TypeAlias = dict[str, Any]
# Taken over from result.json as they are.
_FIELDS = (
    "name",
    "status",
    "message",
    "method",
    "model",
    "dataset",
    "task",
    "engine",
    "precision",
    "seed",
    "world_size",
    "batch_size",
    "protocol",
    "metric",
    "best_step",
    "steps",
    "total_steps",
    "trainable_parameters",
    "total_parameters",
)
# There in every DataFrame, so that no table or figure has to ask; NaN where no run has the value.
_NUMBERS = (
    "score",
    "validation_score",
    "trainable_percent",
    "peak_total_mib",
    *(f"peak_{category}_mib" for category in MEMORY_CATEGORIES),
    "images_per_s",
    "adapter_kib",
    "seconds_total",
)


def load_runs(paths: Sequence[str | Path]) -> pd.DataFrame:
    """One row per run found in `paths`: run folders, or folders at any depth above them.

    Columns beside the fields of `Result`: `folder`; `headline`, the metric that tables show first, and `score`,
    its value on test; `validation_score`, on validation the metric that chose the best step; `reported`, all that
    tables show; `metric_sources` (JSON); `<split>_<metric>`; `trainable_percent`; `peak_total_mib`,
    `peak_<category>_mib`, `peak_phase` and `phase_<phase>_mib` (MiB = 2^20 bytes); `images_per_s` and what else
    `throughput` holds; `seconds_<part>`; `adapter_kib`; `varied.<key>`; and `compared`, False for a run found
    beside a comparison that it is no part of.

    A damaged or unfinished record is named on stderr and left out.
    ValueError: a path does not exist, or there is no run in any of them.
    """
    rows = []
    for folder, direct in _run_folders(paths):
        try:
            result = read_result(folder)
            rows.append(_row(folder, result) | {"compared": direct or bool(result.varied)})
        except (ValueError, TypeError, AttributeError) as error:
            print(f"skipped: {error} [{folder}]", file=sys.stderr)
    if not rows:
        places = ", ".join(str(path) for path in paths) or "no folder"
        raise ValueError(
            f"{places}: holds no readable run, expected folders with a result.json; make some with "
            "`snell-scale run` or `snell-scale compare`, or give the folder that they are in"
        )
    frame = pd.DataFrame(rows)
    if not frame["compared"].any():
        frame["compared"] = True
    for column in _NUMBERS:
        values = frame[column] if column in frame else pd.Series(index=frame.index, dtype=float)
        frame[column] = pd.to_numeric(values)
    return frame


def load_curves(runs: pd.DataFrame) -> pd.DataFrame:
    """The evaluations during training of `runs`: columns folder, split, step, value (of the run's metric)."""
    lines = []
    for folder, metric in zip(runs["folder"], runs["metric"], strict=True):
        for line in read_steps(Path(folder)):
            if "split" in line and isinstance(value := line.get(metric), int | float):
                lines.append({"folder": folder, "split": line["split"], "step": line["step"], "value": value})
    return pd.DataFrame(lines, columns=["folder", "split", "step", "value"])


def load_environments(runs: pd.DataFrame) -> pd.DataFrame:
    """The content of each run's environment.json: one row per run, one dotted column per entry."""
    rows = []
    for folder in runs["folder"]:
        path = Path(folder) / "environment.json"
        try:
            rows.append(dict(_flat(json.loads(path.read_text(encoding="utf-8")))))
        except (OSError, ValueError) as error:
            print(f"no environment: {error}", file=sys.stderr)
    return pd.DataFrame(rows)


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The rows as dictionaries of plain Python values."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _run_folders(paths: Sequence[str | Path]) -> Iterator[tuple[Path, bool]]:
    """Every run folder once, and whether it was named itself (not found in a folder above it)."""
    seen = set()
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; give a run folder, or a folder that holds run folders")
        for parent, folders, files in os.walk(path):
            folders.sort()
            folder = Path(parent)
            if "result.json" in files:
                folders.clear()  # nothing inside a run is another run
                if folder.resolve() not in seen:
                    seen.add(folder.resolve())
                    yield folder, folder == path
            elif "steps.jsonl" in files:
                print(f"skipped: {folder} holds no result.json: the run has not ended", file=sys.stderr)


def _row(folder: Path, result: Result) -> Row:
    row: Row = {"folder": str(folder)}
    row |= {name: getattr(result, name) for name in _FIELDS}
    for split, metrics in result.metrics.items():
        row |= {f"{split}_{metric}": value for metric, value in metrics.items()}
    row["reported"] = " ".join(result.reported or ([result.metric] if result.metric else []))
    row["headline"] = row["reported"].split()[0] if row["reported"] else None
    row["metric_sources"] = json.dumps(dict(result.metric_sources), sort_keys=True)
    row["score"] = row.get(f"test_{row['headline']}")
    row["validation_score"] = row.get(f"validation_{result.metric}")
    if result.trainable_parameters is not None and result.total_parameters:
        row["trainable_percent"] = 100 * result.trainable_parameters / result.total_parameters
    if result.adapter_bytes is not None:
        row["adapter_kib"] = result.adapter_bytes / 1024
    row |= dict(result.throughput)
    row |= {f"seconds_{part}": value for part, value in result.seconds.items()}
    row |= _memory(result.memory or {})
    row |= {f"varied.{key}": _plain(value) for key, value in result.varied.items()}
    return row


def _memory(memory: Mapping[str, Any]) -> Row:
    peak = memory.get("peak", {})
    row = {
        f"peak_{key.removesuffix('_bytes')}_mib": value / MIB
        for key, value in peak.items()
        if key.endswith("_bytes") and value is not None
    }
    for phase, entry in memory.get("phases", {}).items():
        row[f"phase_{phase}_mib"] = entry["total_bytes"] / MIB
    about = {
        "peak_phase": peak.get("phase"),
        "memory_device": memory.get("device"),
        "memory_source": memory.get("source"),
    }
    return row | about


def _plain(value: Any) -> Any:
    """A value that pandas can group by; null is a value here, and not the same as a key that is not there."""
    if value is None:
        return "null"
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _flat(value, f"{prefix}.{index}")
    else:
        yield prefix, content
