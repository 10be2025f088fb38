"""The Triton implementation's gradients against autograd of the specification in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from snell_scale.kernels.merge.delta import KERNEL_PARAMETERS, Delta, FactorGradients

from .merge_cases import MergeCase, relative_error
from .merge_triton_cases import (
    DEVICE,
    SHAPES,
    Shape,
    exact_taus,
    make_delta,
    require_interpreter_or_gpu,
    triton_impl,
)

KERNELS = ("distance", "mixk", "linear", "sigmoid", "rbf", "exponential")

# Interpreted, a kernel is numpy, which warns of what a GPU computes in silence and the kernel then discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Relative to the largest entry of a gradient. Float32 products and sums: seen 1e-6. A distance has an error of
# some eps (|a|² + |b|²)/d, which dK / d repeats for each close pair; and dα of mixk is a sum of thousands that
# cancel: seen 7e-5.
TOLERANCES = {"distance": 2e-4, "mixk": 2e-4, "linear": 1e-5, "sigmoid": 1e-5, "rbf": 1e-5, "exponential": 2e-5}


@pytest.fixture(scope="module", autouse=True)
def _interpreter_or_gpu() -> None:
    require_interpreter_or_gpu()


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: a partial sum that no program writes shows."""
    empty: Callable[..., Tensor] = torch.empty

    def poisoned(*args: int, **options: object) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", poisoned)


def _grad(delta: Delta, num_columns: int | None = None) -> Tensor:
    shape = (delta.num_groups * delta.num_rows, num_columns or delta.num_columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)


def _names(delta: Delta) -> tuple[str, ...]:
    return ("A", "B", *KERNEL_PARAMETERS[delta.kernel])


def _gradients(
    delta: Delta,
    G: Tensor,
    *,
    sparsity: float | None = 0.6,
    ranges: tuple[slice, ...] | None = None,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """By name, those asked for; G is cut into the ranges of columns."""
    names = _names(delta)
    gradients = FactorGradients.zeros(delta, [wanted is None or name in wanted for name in names])
    logs = triton_impl.column_logs(delta)
    taus = exact_taus(delta, logs, sparsity=sparsity)
    for columns in ranges or (slice(0, delta.num_columns),):
        triton_impl.add_gradients(delta, taus, logs, G[:, columns], columns, gradients)
    found = (gradients.A, gradients.B, *gradients.params)
    return {name: each for name, each in zip(names, found, strict=True) if each is not None}


def _assert_close(actual: dict[str, Tensor], case: MergeCase, G: Tensor) -> None:
    leaves = [case.leaves()[name] for name in actual]
    expected = torch.autograd.grad(case.reference_delta(), leaves, G.cpu().double())
    errors = {
        name: relative_error(actual[name].cpu(), truth) for name, truth in zip(actual, expected, strict=True)
    }
    assert max(errors.values()) <= TOLERANCES[case.settings["kernel"]], errors


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("weighting", "shape"),
    [(weighting, SHAPES[2]) for weighting in ("magnitude", "soft", "hard", "dense")]
    + [("magnitude", shape) for shape in (SHAPES[0], SHAPES[1], SHAPES[3])]
    + [("dense", SHAPES[1])],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_equal_the_specifications(kernel: str, weighting: str, shape: Shape) -> None:
    sparsity = None if weighting == "dense" else 0.6
    delta, case = make_delta(
        kernel, shape, weighting="hard" if sparsity is None else weighting, sparsity=sparsity
    )  # fmt: skip
    G = _grad(delta)
    _assert_close(_gradients(delta, G, sparsity=sparsity), case, G)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_what_is_asked_for(kernel: str) -> None:
    delta, _ = make_delta(kernel, (1, 7, 5, 4, 2))
    G = _grad(delta)
    everything = _gradients(delta, G)
    names = _names(delta)
    for wanted in (*itertools.combinations(names, 1), *itertools.combinations(names, len(names) - 1), ()):
        found = _gradients(delta, G, wanted=wanted)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], everything[name]) for name in wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_partial_sum_of_what_nobody_asked_for(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[triton_impl._PartialGradients] = []
    add = triton_impl._GradientTask._add
    monkeypatch.setattr(
        triton_impl._GradientTask,
        "_add",
        lambda task, partial, first_row: (launched.append(partial), add(task, partial, first_row)),
    )
    delta, _ = make_delta(kernel, SHAPES[1])
    _gradients(delta, _grad(delta), wanted=("B",))
    assert launched[0].B is not None
    assert launched[0].A is None
    assert launched[0].params is None


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("kernel", ["distance", "mixk", "sigmoid"])
def test_many_launches_and_stripes_give_the_same(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little scratch: row blocks one by one, and more rows than one chunk of mixk's column sums."""
    delta, case = make_delta(kernel, (1, 261, 40, 4, 2))
    G = _grad(delta)
    _assert_close(_gradients(delta, G), case, G)
    monkeypatch.setattr(triton_impl, "MIN_SCRATCH_BYTES", 1)
    monkeypatch.setattr(triton_impl, "SCRATCH_BYTES_PER_ENTRY", 0.2)
    _assert_close(_gradients(delta, G), case, G)


@pytest.mark.parametrize(
    ("kernel", "rank", "components"), [("distance", 64, 1), ("linear", 130, 2), ("mixk", 6, 3)]
)
def test_ranks_that_no_tile_divides(kernel: str, rank: int, components: int) -> None:
    delta, case = make_delta(kernel, (1, 20, 18, rank, components))
    G = _grad(delta)
    _assert_close(_gradients(delta, G), case, G)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_runs_are_bit_identical(kernel: str) -> None:
    delta, _ = make_delta(kernel, (1, 70, 40, 8, 2))
    G = _grad(delta)
    first, second = _gradients(delta, G), _gradients(delta, G)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ranges_of_columns_add_up(kernel: str) -> None:
    delta, case = make_delta(kernel, SHAPES[2])
    G = _grad(delta)
    ranges = (slice(0, 1), slice(1, 40), slice(40, 40), slice(40, 65))
    _assert_close(_gradients(delta, G, ranges=ranges), case, G)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "one row repeated"])
def test_any_dtype_and_strides_of_the_incoming_gradient(dtype: torch.dtype, layout: str) -> None:
    """Whatever is not in G's rounding is float32: the truth gets the same rounded G."""
    delta, case = make_delta("mixk", (2, 33, 20, 4, 2))
    G = _grad(delta).to(dtype)
    G = {"contiguous": G, "transposed": G.T.contiguous().T, "one row repeated": G[:1].expand(G.shape)}[layout]
    _assert_close(_gradients(delta, G), case, G)


@pytest.mark.parametrize("kernel", ["mixk", "sigmoid", "rbf", "exponential"])
def test_the_mask_is_the_merged_weights(kernel: str) -> None:
    """Of ones under a hard mask, the sum of dK counts the survivors: exactly those above the exact threshold."""
    delta, _ = make_delta(kernel, SHAPES[3], weighting="hard")
    G = torch.ones(delta.num_rows, delta.num_columns, device=DEVICE)
    name = "beta" if kernel == "mixk" else "gamma"
    count = delta.num_entries - 1 - int(0.6 * (delta.num_entries - 1))
    assert _gradients(delta, G, wanted=(name,))[name].item() == count


@pytest.mark.parametrize("kernel", ["distance", "mixk", "exponential"])
@pytest.mark.parametrize("sparsity", [None, 0.0])
def test_zero_distances_have_zero_gradients(kernel: str, sparsity: float | None) -> None:
    delta, _ = make_delta(kernel, SHAPES[2], sparsity=sparsity)
    for factor in (delta.A, delta.B):
        factor.zero_()
    gradients = _gradients(delta, _grad(delta), sparsity=sparsity)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["A"].count_nonzero() == gradients["B"].count_nonzero() == 0


def test_scratch_is_a_share_of_the_incoming_gradient() -> None:
    """A large layer's partial sums: at most SCRATCH_BYTES_PER_ENTRY for dA and as much for dB."""
    shape = (1, 4096, 1024, 32, 2)
    delta, _ = make_delta("distance", shape)
    config = triton_impl.GRADIENT_CONFIG
    plan = triton_impl._GradientPlan.of(delta, 1024)
    bound = triton_impl.SCRATCH_BYTES_PER_ENTRY * 4096 * 1024
    assert plan.blocks_per_launch * 1024 * 32 * 4 <= bound
    assert plan.num_stripes * plan.blocks_per_launch * config.block_m * 32 * 4 <= bound
    assert plan.num_stripes * plan.tiles_per_stripe * config.block_n >= 1024
    assert triton_impl.gradient_scratch_bytes(delta) <= 2 * bound


def test_offsets_beyond_32_bits() -> None:
    """Two rows 2^31 elements apart: an offset in int32 would wrap. The memory between them is never touched."""
    apart = 2**31 + 8
    delta, _ = make_delta("distance", (1, 2, 9, 2, 2))
    G = torch.empty(apart + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 9), (apart, 1))
    G.copy_(_grad(delta))
    expected, actual = _gradients(delta, G.clone()), _gradients(delta, G)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
