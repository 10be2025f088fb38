"""The record of a run on disk: its schema, an atomic writer and a reader. No torch: analysis reads with it.

A run folder holds config.yaml (resolved), environment.json, steps.jsonl (one line per logged step or
evaluation) and result.json. result.json exists from the moment a run ends, however it ended.

Where SNELLA shares out its budget, the step's line also has "sparsity" (over all matrices), "nonzeros", and at up
to some 200 ticks "sparsity/<layer>/<index>" of every matrix stacked in every layer.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from snell_scale.record_types import record_type_error
from snell_scale.record_versions import upgraded

SCHEMA_VERSION = 2
Status = Literal["ok", "oom", "diverged", "interrupted", "failed"]
STATUSES: tuple[str, ...] = get_args(Status)
MEMORY_CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "transients",
    "communication",
    "temporary",
    "unexplained",
)
"""What memory is for; instrument.memory says what each means."""


@dataclass(frozen=True)
class Result:
    """result.json. Bytes are bytes, times seconds; None where a run ended before the value existed.

    metrics: split → metric → value, e.g. metrics["test"]["top1"] in percent. `metric` chose the best step;
    `reported` are those of the test split that tables show, the most telling first (empty: `metric`).
    metric_sources: metric → what made its value, where its name does not say it (the feature backend of a FID).
    predicted: nothing ran; the numbers are `snell-scale estimate`'s. created_at: ISO 8601, UTC.
    conditions: what a fair comparison holds constant beside the fields above: microbatch_size,
    gradient_accumulation, activation_checkpointing, frozen_dtype, optimizer, allocator, compile, deterministic,
    ema_decay, fused_attention, data_seed, image_size, data (a digest of the config's section without its
    paths), weights (the file's name, null: random), hardware, num_threads; absent where it is not known.
    num_trainable_params, num_total_params, file_size (of the adapter, bytes): as in PEFT's method_comparison.
    memory: {"device", "source", "phases": {phase: {"total_bytes", "<category>_bytes", …}}, "peak": {…, "phase"},
    "rank", "ranks": [the same of every rank], "allocator", "host"}, of the rank with the largest peak; "peak" is
    {} where a run ended before its measured step, and "ranks" holds one where they did not end together.
    throughput: {"images_per_s", "step_ms_median", …}, as instrument.throughput reports it.
    flops: {"model_flops", "hardware_flops", "mfu", "hfu", …} of a step on one rank, as instrument.flops reports
    it; None for compiled code.
    skipped: what data.skip_broken left out of the data, file by file.
    varied: the dotted keys in which this run differs from the others of its comparison.
    communication: what one step's collectives carried, as instrument.communication reports it; None on one rank.
    protocol: "validation" (validation chooses, test reports once) or "best-test" (published, optimistic).
    """

    name: str
    status: Status
    method: str
    model: str
    dataset: str
    task: str
    engine: str
    precision: str
    seed: int
    world_size: int
    batch_size: int
    protocol: str = "validation"
    message: str | None = None
    metric: str | None = None
    reported: tuple[str, ...] = ()
    metric_sources: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    best_step: int | None = None
    steps: int = 0
    total_steps: int | None = None
    created_at: str | None = None
    predicted: bool = False
    conditions: Mapping[str, Any] = field(default_factory=dict)
    num_trainable_params: int | None = None
    num_total_params: int | None = None
    file_size: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    throughput: Mapping[str, float | None] = field(default_factory=dict)
    memory: Mapping[str, Any] | None = None
    flops: Mapping[str, Any] | None = None
    communication: Mapping[str, Any] | None = None
    divergence: Mapping[str, Any] | None = None
    resumed_from_steps: tuple[int, ...] = ()
    varied: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that `path` holds the old or the new content at every instant, whatever happens.

    Non-finite numbers become null: JSON has none, and a reader must not choke on a diverged run.
    """
    write_atomically(path, (json.dumps(_finite(content), indent=2) + "\n").encode())


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Like `write_json`, as YAML that the config loader reads back."""
    write_atomically(path, yaml.safe_dump(dict(content), sort_keys=False).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, fsync, rename over it, fsync the folder; the old file survives any failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_result(folder: Path, result: Result) -> None:
    write_json(folder / "result.json", asdict(result))


def read_result(folder: Path) -> Result:
    """The result in a run folder. ValueError names the file and what is wrong with it."""
    path = folder / "result.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no result.json: the run has not ended, or this is no run folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if isinstance(raw, dict):
        raw = upgraded(raw, folder)
    if not isinstance(raw, dict) or raw.get("schema_version") != SCHEMA_VERSION:
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        raise ValueError(f"{path} has schema version {version}, expected {SCHEMA_VERSION}")
    unknown = raw.keys() - {f.name for f in fields(Result)}
    required = {f.name for f in fields(Result) if f.default is MISSING and f.default_factory is MISSING}
    missing = required - raw.keys()
    if unknown or missing or raw["status"] not in STATUSES:
        raise ValueError(
            f"{path}: unknown {sorted(unknown)}, missing {sorted(missing)}, status {raw.get('status')!r}"
        )
    error = record_type_error(raw, _declared_types())
    if error:
        raise ValueError(f"{path} is damaged: {error}")
    return Result(**raw)


@cache
def _declared_types() -> dict[str, Any]:
    return get_type_hints(Result)


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of steps.jsonl, in order; what a crash cut short or damaged is left out."""
    path = folder / "steps.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class StepWriter:
    """Appends lines to steps.jsonl; each is flushed, so that a killed run keeps what it logged."""

    def __init__(self, folder: Path, *, keep_until_step: int) -> None:
        """Opens the file; lines of steps after `keep_until_step` (done again by a resumed run) are dropped."""
        self._path = folder / "steps.jsonl"
        kept = [line for line in read_steps(folder) if line["step"] <= keep_until_step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_finite(line)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class NoWriter:
    """In place of a StepWriter on the ranks that write nothing."""

    def write(self, line: Mapping[str, Any]) -> None:
        return None

    def close(self) -> None:
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
