"""The op and its specification against numbers that the authors' own modules computed in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snell_scale.kernels.merge import delta_weight, merge_linear
from snell_scale.kernels.merge.reference import delta_weight_reference

from .merge_cases import Settings, assert_close

GOLDEN = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "golden_merge.json").read_text())

# Seen: 7e-15 at worst (dgamma), everything else below 3e-15.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    with np.load(GOLDEN / "golden_merge.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


@pytest.mark.parametrize("implementation", ["op", "specification"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['method']}")
def test_every_golden_number(case: dict[str, Any], implementation: str, arrays: dict[str, Tensor]) -> None:
    expected = {key.split("/")[1]: value for key, value in arrays.items() if key.startswith(f"{case['id']}/")}
    A, B, x = (expected.pop(name).clone().requires_grad_() for name in ("A", "B", "x"))
    gy = expected.pop("gy")
    settings = _settings(case)
    if implementation == "op":
        delta = delta_weight(A, B, **settings)
        y = merge_linear(x, None, A, B, **settings)
    else:
        delta = delta_weight_reference(A, B, **settings)
        y = F.linear(x, delta)
    y.backward(gy)
    leaves = {"A": A, "B": B, "x": x} | dict(settings["kernel_params"])
    actual = {"y": y, "delta_w": delta} | {f"d{name}": _gradient(leaf) for name, leaf in leaves.items()}
    assert_close(actual, expected, tolerance=TOLERANCE)
    assert int(delta.count_nonzero()) == case["nnz"]


def test_there_are_golden_cases_of_every_kind() -> None:
    assert {case["method"] for case in CASES} == {"klora", "snell", "mixk", "snella"}
    assert len(CASES) == 14


def _settings(case: dict[str, Any]) -> Settings:
    is_mixed = case["method"] in ("mixk", "snella")
    params = {
        name: torch.tensor([case[name]], dtype=torch.float64, requires_grad=True)
        for name in ("alpha", "gamma", "beta")
    }
    return Settings(
        sparsity=case["sparsity"],
        kernel="mixk" if is_mixed else "distance",
        weighting="magnitude",
        # The authors' modules hold the coefficient 0.1 in float32 and were converted to float64 afterwards:
        # with 0.1 itself everything is 1.5e-8 off per power of c.
        scale=float(np.float32(case["scale"])),
        kernel_params=params if is_mixed else {},
    )


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
