"""The Triton implementation's thresholds: the exact order statistic of the very |K| that the merge computes."""

import pytest
import torch
from torch import Tensor

from snell_scale.kernels.merge.delta import Delta

from .merge_triton_cases import (
    DEVICE,
    SHAPES,
    Shape,
    magnitudes,
    make_delta,
    require_interpreter_or_gpu,
    triton_impl,
)

KERNELS = ("distance", "mixk", "linear", "sigmoid", "rbf", "exponential")

# Interpreted, a kernel is numpy, which warns of what a GPU computes in silence and the kernel then discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LARGE = (2, 130, 70, 4, 2)  # 9100 entries a group: more than are collected without a bracket


@pytest.fixture(scope="module", autouse=True)
def _interpreter_or_gpu() -> None:
    require_interpreter_or_gpu()


@pytest.fixture
def only_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the histogram passes: τ is right only if the bracket held it."""
    monkeypatch.setattr(triton_impl._Selection, "_count", lambda *_, **__: None)


def _assert_exact(delta: Delta, ranks: Tensor, memory: Tensor | None = None) -> Tensor:
    logs = triton_impl.column_logs(delta)
    taus = triton_impl.find_thresholds(delta, logs, ranks, memory)
    expected = magnitudes(delta, logs).sort(dim=1).values.gather(1, ranks[:, None]).squeeze(1)
    assert torch.equal(taus.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    return taus


def _ranks(delta: Delta, *shares: float) -> Tensor:
    """One rank per group, the shares taking turns."""
    ranks = [int(shares[g % len(shares)] * (delta.num_entries - 1)) for g in range(delta.num_groups)]
    return torch.tensor(ranks, device=DEVICE)


def _cold(delta: Delta) -> Tensor:
    return torch.full((delta.num_groups, 2), torch.nan, device=DEVICE)


@pytest.mark.parametrize(
    ("shape", "is_remembered"), [*((shape, True) for shape in SHAPES[:3]), (LARGE, True), (LARGE, False)], ids=str
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_to_a_sort(kernel: str, shape: Shape, is_remembered: bool) -> None:
    delta, _ = make_delta(kernel, shape)
    _assert_exact(delta, _ranks(delta, 0.6, 0.1, 0.95), _cold(delta) if is_remembered else None)


@pytest.mark.parametrize("shares", [(0.0, 1.0), (1e-4, 0.9999), (0.5, 0.999)])
@pytest.mark.parametrize("is_remembered", [True, False])
def test_first_and_last_ranks(shares: tuple[float, float], is_remembered: bool) -> None:
    delta, _ = make_delta("distance", LARGE)
    memory = _cold(delta) if is_remembered else None
    for _ in range(3 if is_remembered else 1):
        _assert_exact(delta, _ranks(delta, *shares), memory)


@pytest.mark.usefixtures("only_one_pass")
@pytest.mark.parametrize(("kernel", "share"), [("distance", 0.05), ("mixk", 0.9), ("rbf", 0.5)])
def test_a_sample_finds_it_in_one_pass(kernel: str, share: float) -> None:
    """Four standard errors: these seeds are no exceptions."""
    delta, _ = make_delta(kernel, (1, 150, 500, 4, 2))
    _assert_exact(delta, _ranks(delta, share))


def test_memory_is_filled_and_then_saves_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, _ = make_delta("distance", LARGE)
    memory, ranks = _cold(delta), _ranks(delta, 0.6, 0.9)
    taus = _assert_exact(delta, ranks, memory)
    lower, upper = memory.clone().unbind(1)
    assert torch.allclose(upper - lower, 0.02 * taus, rtol=1e-4)
    assert ((lower < taus) & (taus < upper)).all()
    monkeypatch.setattr(triton_impl._Selection, "_count", lambda *_, **__: None)
    delta.B.mul_(1.001)  # a step of training
    moved = _assert_exact(delta, ranks, memory)
    assert not torch.equal(moved, taus)
    half = (memory[:, 1] - memory[:, 0]) / 2
    expected = (3 * (moved - (lower + upper) / 2).abs()).clamp(min=0.001 * moved, max=0.03 * moved)
    assert torch.allclose(half, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bracket", [(0.0, 1e-6), (1e6, 1e7), (0.0, torch.inf), (0.2, 0.1), (0.0, 0.0)])
def test_a_wrong_bracket_costs_time_only(bracket: tuple[float, float]) -> None:
    """Below, above, more than can be collected, inside out, empty: all are noticed."""
    delta, _ = make_delta("distance", LARGE)
    memory = torch.tensor([bracket, bracket], device=DEVICE)
    taus = _assert_exact(delta, _ranks(delta, 0.6, 0.9), memory)
    assert ((memory[:, 0] < taus) & (taus < memory[:, 1])).all()


def test_one_group_may_miss_what_another_finds() -> None:
    delta, _ = make_delta("distance", LARGE)
    ranks, memory = _ranks(delta, 0.6, 0.9), _cold(delta)
    _assert_exact(delta, ranks, memory)
    memory[0] = torch.tensor([1e6, 1e7])
    _assert_exact(delta, ranks, memory)


def test_where_magnitudes_are_crowded_the_bracket_narrows(monkeypatch: pytest.MonkeyPatch) -> None:
    """|K| within 0.1 % of one value: 1 % about τ would be everything, and never found in one pass."""
    delta, _ = make_delta("rbf", LARGE)
    delta.params[0].mul_(1e-4)
    ranks, memory = _ranks(delta, 0.6, 0.5), _cold(delta)
    _assert_exact(delta, ranks, memory)
    monkeypatch.setattr(triton_impl._Selection, "_count", lambda *_, **__: None)
    _assert_exact(delta, ranks, memory)


@pytest.mark.parametrize("shape", [(3, 7, 5, 2, 2), LARGE], ids=str)
@pytest.mark.parametrize("is_remembered", [True, False])
@pytest.mark.parametrize("num_equal", ["all", "most"])
def test_ties(shape: Shape, is_remembered: bool, num_equal: str) -> None:
    delta, _ = make_delta("distance", shape)
    rows = slice(0, None if num_equal == "all" else delta.num_rows * 3 // 4)
    delta.B[:, :, rows] = 0
    delta.A.zero_()
    memory = _cold(delta) if is_remembered else None
    for _ in range(2 if is_remembered else 1):
        _assert_exact(delta, _ranks(delta, 0.6, 0.9), memory)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("is_remembered", [True, False])
@pytest.mark.parametrize("shares", [(0.0, 1.0), (0.6, 0.9)])
def test_what_is_not_finite_comes_last(bad: float, is_remembered: bool, shares: tuple[float, float]) -> None:
    delta, _ = make_delta("linear", LARGE)
    delta.A[:, :, 3] = bad
    memory = _cold(delta) if is_remembered else None
    for _ in range(2 if is_remembered else 1):
        _assert_exact(delta, _ranks(delta, *shares), memory)
