"""Records of earlier schema versions, brought to the present one step by step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]

_RENAMED_IN_2 = {
    "trainable_parameters": "num_trainable_params",
    "total_parameters": "num_total_params",
    "adapter_bytes": "file_size",
}
# config.yaml's keys that became conditions of the record.
_CONDITIONS_IN_2 = {
    "gradient_accumulation": ("training", "gradient_accumulation"),
    "activation_checkpointing": ("training", "activation_checkpointing"),
    "compile": ("training", "compile"),
    "deterministic": ("training", "deterministic"),
    "ema_decay": ("training", "ema_decay"),
    "frozen_dtype": ("engine", "frozen_dtype"),
    "data_seed": ("data_seed",),
}


def upgraded(record: Record, folder: Path) -> Record:
    """The record as the present version would have it; one of the present or an unknown version as it is.

    folder: its own, whose config.yaml tells what early records left out. What nothing tells stays absent.
    """
    while (version := record.get("schema_version")) in tuple(_UPGRADES):
        record = _UPGRADES[version](record, folder)
    return record


def _from_1(record: Record, folder: Path) -> Record:
    """Version 2: PEFT's field names, the conditions that a comparison holds constant, all ranks' memory.

    Memory of version 1 has no "transients", "communication" and "unexplained": its "temporary" was all of that.
    """
    new = {_RENAMED_IN_2.get(key, key): value for key, value in record.items()}
    memory = new.get("memory")
    if isinstance(memory, Mapping):
        peaks = memory.get("peak_bytes_of_ranks", ())
        ranks = [{"rank": rank, "peak": {"total_bytes": peak}} for rank, peak in enumerate(peaks)]
        rest = {key: value for key, value in memory.items() if key != "peak_bytes_of_ranks"}
        new["memory"] = {**rest, **({"ranks": ranks} if ranks else {})}
    return {**new, "conditions": _conditions_of(folder), "schema_version": 2}


def _conditions_of(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = {name: _at(config, path) for name, path in _CONDITIONS_IN_2.items()}
    return {name: value for name, value in found.items() if value is not None}


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


_UPGRADES: dict[int, Callable[[Record, Path], Record]] = {1: _from_1}
