"""Run folders → one tidy DataFrame with one row per run, and one with the evaluations during training."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis.record_cache import MIN_RECORDS, Stamped, cache_file, read_cache, stamp_of, write_cache
from analysis.rows import CONDITIONS, NUMBERS, Row, row_of
from snell_scale.records import read_result, read_steps


def load_runs(paths: Sequence[str | Path]) -> pd.DataFrame:
    """One row per run found in `paths`: run folders, their result.json, or folders at any depth above them.

    Columns beside the fields of `Result`: `folder`; `headline`, the metric that tables show first, and `score`,
    its value on test; `validation_score`, on validation the metric that chose the best step; `reported`, all that
    tables show; `metric_sources` (JSON); `<split>_<metric>`; `trainable_percent`; `peak_total_mib`,
    `peak_<category>_mib`, `peak_phase` and `phase_<phase>_mib` (MiB = 2^20 bytes); `rank_peak_min_mib` and
    `rank_peak_max_mib` over the ranks; `allocated_mib`, `reserved_mib` and `nvml_used_mib` of the peak's phase;
    `wire_bytes_per_rank`; `images_per_s` and what else `throughput` holds; `model_flops`, `mfu` and `hfu`;
    `seconds_<part>`; `adapter_kib`; every condition under its own name (rows.CONDITIONS are always there);
    `varied.<key>`; `skipped` (rows.py); and `compared`, False for a run that was found under the same path as a
    comparison and is no part of it: one that is named itself, or came by another path, is compared.
    What a record does not know is NaN or None.

    Many records are kept in the user's cache, and read again only where they have changed (record_cache.py).
    A damaged or unfinished record is named on stderr and left out.
    ValueError: a path does not exist, or there is no run in any of them.
    """
    rows = _read_rows(paths)
    if not rows:
        places = ", ".join(str(path) for path in paths) or "no folder"
        raise ValueError(
            f"{places}: holds no readable run, expected folders with a result.json; make some with "
            "`snell-scale run` or `snell-scale compare`, or give the folder that they are in"
        )
    frame = pd.DataFrame(rows)
    always = [name for name in (*CONDITIONS, *NUMBERS) if name not in frame]
    frame = frame.reindex(columns=[*frame.columns, *always])
    return frame.assign(**{name: pd.to_numeric(frame[name]) for name in NUMBERS})


def load_curves(runs: pd.DataFrame) -> pd.DataFrame:
    """The evaluations during training of `runs`: columns folder, split, step, value (of the run's metric)."""
    lines = []
    for folder, metric in zip(runs["folder"], runs["metric"], strict=True):
        for line in read_steps(Path(folder)):
            if "split" in line and isinstance(value := line.get(metric), int | float):
                lines.append({"folder": folder, "split": line["split"], "step": line["step"], "value": value})
    return pd.DataFrame(lines, columns=["folder", "split", "step", "value"])


def load_environments(runs: pd.DataFrame) -> pd.DataFrame:
    """The content of each run's environment.json: one dotted column per entry, and the index of `runs`.

    A run without one has no row; how many these are is said on stderr in one line.
    """
    rows, missing = {}, []
    for index, folder in zip(runs.index, runs["folder"], strict=True):
        path = Path(folder) / "environment.json"
        try:
            rows[index] = dict(_flat(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError) as error:
            missing.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
    if missing:
        count = f"{len(missing)} of {len(runs)} runs, first " if len(missing) > 1 else ""
        print(f"no environment: {count}{missing[0]}", file=sys.stderr)
    return pd.DataFrame.from_dict(rows, orient="index")


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The rows as dictionaries of plain Python values."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _read_rows(paths: Sequence[str | Path]) -> list[Row]:
    """The rows of all readable records in the order of the folders, from the cache where that knows them."""
    found = _run_folders(paths)
    cache = cache_file(paths) if len(found) >= MIN_RECORDS else None
    known = read_cache(cache) if cache is not None else {}
    rows, paths_of, kept = [], [], {}
    for run in found:
        # Taken before reading: a record that is replaced meanwhile is read again the next time.
        stamp = stamp_of(run.folder) if cache is not None else ""
        before = known.get(run.place)
        row = before.row if before is not None and before.stamp == stamp else _readable_row(run.folder)
        if row is not None:
            kept[run.place] = Stamped(stamp, row)
            rows.append({"folder": str(run.folder), **row})
            paths_of.append(run.paths)
    if cache is not None and kept != known:
        write_cache(cache, kept)
    _mark_compared(rows, paths_of)
    return rows


def _mark_compared(rows: Sequence[Row], paths_of: Sequence[set[Path]]) -> None:
    """Give every row `compared`. paths_of: the paths that lead to each, of which one may be its own folder."""
    varied = [any(key.startswith("varied.") for key in row) for row in rows]
    studies = {path for is_varied, paths in zip(varied, paths_of, strict=True) if is_varied for path in paths}
    for row, is_varied, paths in zip(rows, varied, paths_of, strict=True):
        row["compared"] = is_varied or not paths <= studies


def _readable_row(folder: Path) -> Row | None:
    try:
        return row_of(read_result(folder))
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        print(f"skipped: {error} [{folder}]", file=sys.stderr)
        return None


class _Found(NamedTuple):
    """A run folder as it was found first; `place`: its absolute path; `paths`: those given that lead to it."""

    folder: Path
    place: str
    paths: set[Path]


def _run_folders(paths: Sequence[str | Path]) -> list[_Found]:
    """Every run folder once, in the order in which they are found."""
    found: dict[str, _Found] = {}
    for path in map(Path, paths):
        start = _folder_to_search(path)
        for parent, folders, files in os.walk(start):
            folders.sort()
            folder = Path(parent)
            if "result.json" in files:
                folders.clear()  # nothing inside a run is another run
                place = str(folder.resolve())
                found.setdefault(place, _Found(folder, place, set())).paths.add(start)
            elif "steps.jsonl" in files:
                print(f"skipped: {folder} holds no result.json: the run has not ended", file=sys.stderr)
    return list(found.values())


def _folder_to_search(path: Path) -> Path:
    if path.is_dir():
        return path
    if path.is_file() and path.name == "result.json":
        return path.parent
    raise ValueError(
        f"{path} is not a folder; give a run folder, its result.json, or a folder that holds run folders"
    )


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _flat(value, f"{prefix}.{index}")
    else:
        yield prefix, content
