"""How far full, GPS and BitFit training moved a model's matrices: trained.safetensors less the base weights."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import safe_open

from analysis.updates.layers import block_of, natural, num_stacked

_INDICES, _VALUES = "#indices", "#values"
Entry = tuple[str, int, tuple[int, int], Callable[[], np.ndarray]]


def changes(folder: Path, trained: Path) -> Iterator[Entry]:
    """(layer, index in it, shape, how to compute it) of every matrix in the model's repeated blocks.

    ValueError where none was trained, or the base weights are not a safetensors file at hand.
    """
    with safe_open(trained, framework="np") as file:
        names = {name.removesuffix(_VALUES) for name in list(file.keys()) if not name.endswith(_INDICES)}
    wanted = sorted((name for name in names if block_of(name) is not None), key=natural)
    base = _base_weights(folder)
    with safe_open(base, framework="np") as file:
        present = set(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in wanted if name in present}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) in (2, 4)}
    if not matrices:
        raise ValueError(f"{folder} trained no matrix that its base weights {base} have")
    for name, (num_rows, *rest) in matrices.items():
        layer, num_columns = name.removesuffix(".weight"), math.prod(rest)
        count = num_stacked(layer, num_rows, num_columns)
        for index in range(count):
            rows = slice(index * num_rows // count, (index + 1) * num_rows // count)
            yield layer, index, (num_rows // count, num_columns), partial(_change, trained, base, name, rows)


def _change(trained: Path, base: Path, name: str, rows: slice) -> np.ndarray:
    with safe_open(base, framework="np") as file:
        before = file.get_tensor(name).astype(np.float64)
    with safe_open(trained, framework="np") as file:
        if name in list(file.keys()):
            after = file.get_tensor(name).astype(np.float64)
        else:
            after = before.copy()
            after.reshape(-1)[file.get_tensor(name + _INDICES)] = file.get_tensor(name + _VALUES)
    return (after - before).reshape(len(before), -1)[rows]


def _base_weights(folder: Path) -> Path:
    """The file that model.weights of the run's config names: as given, or from a folder above the run."""
    with (folder / "config.yaml").open(encoding="utf-8") as file:
        config: Any = yaml.safe_load(file)
    weights = (config.get("model") or {}).get("weights") if isinstance(config, dict) else None
    if isinstance(weights, str) and weights.endswith(".safetensors"):
        for place in (Path(), *folder.resolve().parents):
            if (place / weights).is_file():
                return place / weights
    given = "null, random ones" if weights is None else weights
    raise ValueError(f"{folder} changed base weights that are not at hand as a file (model.weights: {given})")
