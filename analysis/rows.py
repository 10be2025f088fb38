"""One record → one row of the DataFrame of runs, with plain values only; which columns every frame has."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from snell_scale.records import MEMORY_CATEGORIES, Result

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
    "num_trainable_params",
    "num_total_params",
    "file_size",
    "predicted",
    "created_at",
)
# What a fair comparison holds constant, and a record does not know in every case: there in every DataFrame.
CONDITIONS = (
    "microbatch_size",
    "gradient_accumulation",
    "activation_checkpointing",
    "frozen_dtype",
    "optimizer",
    "allocator",
    "compile",
    "deterministic",
    "ema_decay",
    "fused_attention",
    "data_seed",
    "image_size",
    "data",
    "weights",
    "hardware",
    "num_threads",
)
# There in every DataFrame, so that no table or figure has to ask; NaN where no run has the value.
NUMBERS = (
    "score",
    "validation_score",
    "trainable_percent",
    "peak_total_mib",
    *(f"peak_{category}_mib" for category in MEMORY_CATEGORIES),
    "rank_peak_min_mib",
    "rank_peak_max_mib",
    "allocated_mib",
    "reserved_mib",
    "nvml_used_mib",
    "wire_bytes_per_rank",
    "images_per_s",
    "model_flops",
    "mfu",
    "hfu",
    "adapter_kib",
    "seconds_total",
)


def row_of(result: Result) -> Row:
    """The record's row; see `load_runs` for its columns. ValueError where a figure is not a number."""
    row: Row = {name: getattr(result, name) for name in _FIELDS}
    row |= {name: _plain(value) for name, value in result.conditions.items() if value is not None}
    if "weights" in result.conditions:
        row["weights"] = varied_value(result.conditions["weights"])  # null is said: random ones
    row["skipped"] = _skipped(result)
    row |= _metrics(result)
    if result.num_trainable_params is not None and result.num_total_params:
        row["trainable_percent"] = 100 * result.num_trainable_params / result.num_total_params
    if result.file_size is not None:
        row["adapter_kib"] = result.file_size / 1024
    row |= dict(result.throughput)
    row |= {f"seconds_{part}": value for part, value in result.seconds.items()}
    row |= _memory(result.memory or {})
    row["wire_bytes_per_rank"] = (result.communication or {}).get("wire_bytes_per_rank")
    row |= {name: (result.flops or {}).get(name) for name in ("model_flops", "mfu", "hfu")}
    row |= {f"varied.{key}": varied_value(value) for key, value in result.varied.items()}
    for name in NUMBERS:
        value = row.get(name)
        if not (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
            raise ValueError(f"{name} is {value!r}, expected a number")
    return row


def varied_value(value: Any) -> Any:
    """A value that pandas can group by; null is a value here, and not the same as a key that is not there."""
    return "null" if value is None else _plain(value)


def _skipped(result: Result) -> str | None:
    """How many files were left out of the data and, by a digest of their names, which; None: nothing was read."""
    if result.total_steps is None:
        return None
    names = sorted(Path(name).name for name in result.skipped)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:6]
    return f"{len(names)} files ({digest})" if names else "none"


def _metrics(result: Result) -> Row:
    row: Row = {}
    for split, metrics in result.metrics.items():
        row |= {f"{split}_{metric}": value for metric, value in metrics.items()}
    row["reported"] = " ".join(result.reported or ([result.metric] if result.metric else []))
    row["headline"] = row["reported"].split()[0] if row["reported"] else None
    row["metric_sources"] = json.dumps(dict(result.metric_sources), sort_keys=True)
    row["score"] = row.get(f"test_{row['headline']}")
    row["validation_score"] = row.get(f"validation_{result.metric}")
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
    row |= {name: row.get(f"peak_{name}") for name in ("allocated_mib", "reserved_mib", "nvml_used_mib")}
    ranks = [
        rank["peak"]["total_bytes"] / MIB for rank in memory.get("ranks") or ({"peak": peak},) if rank["peak"]
    ]
    about = {
        "rank_peak_min_mib": min(ranks, default=math.nan),
        "rank_peak_max_mib": max(ranks, default=math.nan),
        "peak_phase": peak.get("phase"),
        "memory_device": memory.get("device"),
        "memory_source": memory.get("source"),
    }
    return row | about


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)
