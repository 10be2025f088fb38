"""The updates ΔW that a run learnt, matrix by matrix in numpy, from its adapter folder. No torch.

Formulas: snell_scale/kernels/merge/README.md; SNELL, arXiv 2411.01800; SNELLA, arXiv 2510.24037; LoRA, arXiv
2106.09685. Everything is computed in float64: the masks may differ from the trained model's float32 in single
entries at the threshold, where an update is smallest.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open

from analysis.updates.changes import changes
from analysis.updates.layers import natural, num_stacked

Array: TypeAlias = np.ndarray
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Delta:
    """ΔW of one matrix: `index` counts the matrices stacked in `layer`; `make` computes it, float64 (out, in)."""

    layer: str
    index: int
    shape: tuple[int, int]
    make: Callable[[], Array]


def deltas(folder: Path) -> list[Delta]:
    """The matrices that the run in `folder` adapted, in the order of their names.

    Not the head: it is new, so there is nothing that it is a change of. ValueError says why there are none: no
    adapter, a method that trains no matrix, base weights that are not at hand, a damaged file.
    """
    adapter = folder / "adapter"
    try:
        if (adapter / "adapter_config.json").is_file():
            config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            return list(_of_peft(adapter / "adapter_model.safetensors", config))
        if (adapter / "trained.safetensors").is_file():
            return [Delta(*entry) for entry in changes(folder, adapter / "trained.safetensors")]
    # TypeError: safetensors' for a data type that numpy does not have.
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{adapter} cannot be read: {error}") from None
    raise ValueError(f"{folder} holds no adapter")


def snell_delta(
    A: Array,
    B: Array,
    *,
    sparsity: float | None,
    kernel: str = "distance",
    weighting: str = "magnitude",
    scale: float = 0.1,
    parameters: Mapping[str, float],
) -> Array:
    """ΔW = K ⊙ g ⊙ M of one matrix, (out, in) float64; A (H, in, r/H), B (H, out, r/H).

    The threshold is the ⌊s(N−1)⌋-th smallest magnitude, exactly; sparsity=None is the dense kernelised LoRA.
    """
    A, B = A.astype(np.float64), B.astype(np.float64)
    K = _kernel_matrix(A, B, kernel=kernel, scale=scale, parameters=parameters)
    if sparsity is None:
        return K
    magnitude = np.abs(K)
    position = min(max(math.floor(sparsity * (K.size - 1)), 0), K.size - 1)
    tau = np.partition(magnitude, position, axis=None)[position]
    factor = {"magnitude": magnitude, "soft": magnitude - tau, "hard": 1.0}[weighting]
    return K * factor * (magnitude > tau)


def auto_scale(num_rows: int, num_columns: int, rank: int, num_components: int) -> float:
    """What scale="auto" of an adapter config stands for; the kernels' own `auto_scale`, which needs torch."""

    def mean_square(from_A: float, from_B: float, rank: int, components: int) -> float:
        mean = (from_A + from_B) / 3
        spread = 2 - 1.2 * (from_A**2 + from_B**2) / (from_A + from_B) ** 2
        variance = mean * spread * components / (4 * rank)
        return components * variance + (mean - variance if components % 2 else 0.0)

    authors = mean_square(1 / 768, 1 / 768, 32, 2)
    return 0.1 * math.sqrt(authors / mean_square(1 / num_columns, 1 / num_rows, rank, num_components))


def _kernel_matrix(A: Array, B: Array, *, kernel: str, scale: float, parameters: Mapping[str, float]) -> Array:
    """K, (out, in)."""
    if kernel in ("distance", "mixk"):
        K = np.zeros((B.shape[1], A.shape[1]))
        for h in range(len(A)):
            K += scale * (-1) ** h * np.sqrt(_squared_distances(A[h], B[h]))
        if kernel == "distance":
            return K
        logits = K / parameters["gamma"]
        weights = np.exp(logits - logits.max(axis=0))
        return K + parameters["alpha"] * weights / weights.sum(axis=0) + parameters["beta"]
    inner = np.einsum("hik,hjk->ij", B, A, optimize=True)
    if kernel == "linear":
        return inner
    alpha, gamma, beta = (parameters[name] for name in ("alpha", "gamma", "beta"))
    if kernel == "sigmoid":
        return alpha / (1 + np.exp(-beta * inner)) + gamma
    squares = np.sum([_squared_distances(A[h], B[h]) for h in range(len(A))], axis=0)
    return alpha * np.exp(-beta * (squares if kernel == "rbf" else np.sqrt(squares))) + gamma


def _squared_distances(a: Array, b: Array) -> Array:
    squares = (b * b).sum(axis=1)[:, None] + (a * a).sum(axis=1)[None, :] - 2 * b @ a.T
    return np.maximum(squares, 0.0)


def _of_peft(path: Path, config: Mapping[str, Any]) -> Iterator[Delta]:
    method = config["peft_type"]
    if method not in ("SNELL", "SNELLA", "LORA"):
        raise ValueError(f"{path.parent}: updates of {method} are not computed here")
    ending = ".lora_A.weight" if method == "LORA" else ".snell_A"
    with safe_open(path, framework="np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    for name in sorted((name for name in shapes if name.endswith(ending)), key=natural):
        layer = name.removesuffix(ending)
        if method == "LORA":
            yield from _of_lora(path, layer, config, shapes)
        else:
            yield from _of_snell(path, layer, config, shapes)


def _of_snell(
    path: Path, layer: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Delta]:
    num_groups, _, num_columns, _ = shapes[f"{layer}.snell_A"]
    shape = (shapes[f"{layer}.snell_B"][2], num_columns)
    for index in range(num_groups):
        make = partial(_snell_from_file, path, layer, index, config)
        yield Delta(layer.removeprefix(_PREFIX), index, shape, make)


def _snell_from_file(path: Path, layer: str, index: int, config: Mapping[str, Any]) -> Array:
    with safe_open(path, framework="np") as file:
        own = [name for name in list(file.keys()) if name.startswith(f"{layer}.snell_")]
        values = {name.rpartition("_")[2]: file.get_tensor(name)[index] for name in own}
    A, B = values.pop("A"), values.pop("B")
    sparsity = values.pop("sparsity", config["sparsity"])
    scale = config["scale"]
    if scale == "auto":
        scale = auto_scale(B.shape[1], A.shape[1], A.shape[0] * A.shape[2], A.shape[0])
    return snell_delta(
        A,
        B,
        sparsity=None if sparsity is None else float(sparsity),
        kernel=config["kernel"],
        weighting=config["weighting"],
        scale=scale,
        parameters={name: float(value) for name, value in values.items()},
    )


def _of_lora(
    path: Path, layer: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Delta]:
    changed = [name for name in ("use_dora", "rank_pattern", "alpha_pattern") if config.get(name)]
    if changed:
        raise ValueError(f"{path.parent}: LoRA with {', '.join(changed)} is not computed here")
    rank, *rest = shapes[f"{layer}.lora_A.weight"]
    num_rows = shapes[f"{layer}.lora_B.weight"][0]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    count = num_stacked(layer, num_rows, math.prod(rest))
    for index in range(count):
        rows = slice(index * num_rows // count, (index + 1) * num_rows // count)
        shape = (num_rows // count, math.prod(rest))
        yield Delta(layer.removeprefix(_PREFIX), index, shape, partial(_lora_from_file, path, layer, rows, scale))


def _lora_from_file(path: Path, layer: str, rows: slice, scale: float) -> Array:
    with safe_open(path, framework="np") as file:
        A, B = (file.get_tensor(f"{layer}.lora_{name}.weight").astype(np.float64) for name in "AB")
    return scale * B.reshape(len(B), -1)[rows] @ A.reshape(len(A), -1)
