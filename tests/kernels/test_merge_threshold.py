"""The threshold is exact: every way of finding it against a sort, at every odd input."""

import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snell_scale.kernels.merge import delta_weight, merge_linear, threshold
from snell_scale.kernels.merge.threshold import select_by_digits, select_magnitude, threshold_rank

from .merge_cases import make_case

SPARSITIES = [0.0, 1e-12, 0.3, 0.5, 0.9, 0.999999, 1 - 2**-53, 1.0]


class _Given:
    """Magnitudes that are simply there; counts how often they are walked over."""

    def __init__(self, values: Tensor, *, tile_columns: int = 7) -> None:
        self._values = values
        self._tile_columns = tile_columns
        self.dtype = values.dtype
        self.num_rows, self.num_columns = values.shape
        self.tile_entries = 1 << 18
        self.num_passes = 0

    def tiles(self) -> Iterator[Tensor]:
        self.num_passes += 1
        for tile in self._values.split(self._tile_columns, dim=1):
            yield tile.clone(memory_format=torch.contiguous_format)

    def sample(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self._values[rows][:, columns]


def _values(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    smallest = torch.finfo(dtype).smallest_normal
    return {
        "spread": torch.randn(37, 41, generator=generator, dtype=dtype).abs(),
        "many magnitudes": torch.exp(20 * torch.randn(50, 20, generator=generator, dtype=dtype)),
        "ties": torch.randint(0, 4, (27, 37), generator=generator).to(dtype),
        "all equal": torch.full((8, 8), 0.1, dtype=dtype),
        "all zero": torch.zeros(8, 8, dtype=dtype),
        "one element": torch.tensor([[0.3]], dtype=dtype),
        "two elements": torch.tensor([[0.7, 0.3]], dtype=dtype),
        "neighbours": (torch.ones(50, dtype=dtype) + torch.arange(50) * torch.finfo(dtype).eps).flip(0)[:, None],
        "subnormal": (torch.arange(1, 40, dtype=dtype).flip(0) * smallest / 64)[None],
        "infinite": torch.tensor([[1.0, float("inf"), 0.0, float("inf"), 2.0]], dtype=dtype),
        "not a number": torch.tensor([[1.0, float("nan"), 0.0, -float("nan"), 2.0]], dtype=dtype).abs(),
        "transposed": torch.rand(20, 30, generator=generator, dtype=dtype).T,
    }[name]


_NAMES = [
    "spread",
    "many magnitudes",
    "ties",
    "all equal",
    "all zero",
    "one element",
    "two elements",
    "neighbours",
    "subnormal",
    "infinite",
    "not a number",
    "transposed",
]
# Brackets that are unknown, right, wrong to either side, without width, upside down.
_MEMORIES = [None, (math.nan, math.nan), (0.2, 0.6), (5.0, 6.0), (0.0, 1e-30), (0.1, 0.1), (2.0, 0.5)]


def _assert_found(tau: Tensor, values: Tensor, position: int) -> None:
    assert tau.shape == ()
    assert tau.dtype == values.dtype
    expected = values.flatten().sort().values[position]
    torch.testing.assert_close(tau, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_way_equals_the_sort(
    name: str, dtype: torch.dtype, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = _values(name, dtype)
    rank = threshold_rank(torch.tensor(sparsity, dtype=torch.float64), values.numel())
    _assert_found(select_by_digits(_Given(values).tiles, rank, dtype=dtype), values, int(rank))
    _assert_found(select_magnitude(_Given(values), rank), values, int(rank))
    # Now as a matrix too large to be collected whole.
    monkeypatch.setattr(threshold, "_COLLECTED_WHOLE", 16)
    for bracket in _MEMORIES:
        memory = None if bracket is None else torch.tensor(bracket)
        given_values = _Given(values)
        _assert_found(select_magnitude(given_values, rank, memory), values, int(rank))
        assert given_values.num_passes <= (3 if dtype == torch.float32 else 5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(0, math.inf, width=32), min_size=1, max_size=60),
    sparsity=st.floats(0, 1),
    bracket=st.none() | st.tuples(st.floats(width=32), st.floats(width=32)),
    is_double=st.booleans(),
)
def test_any_values_and_any_memory(
    values: list[float], sparsity: float, bracket: tuple[float, float] | None, is_double: bool
) -> None:
    matrix = torch.tensor([values], dtype=torch.float64 if is_double else torch.float32)
    rank = threshold_rank(torch.tensor(sparsity, dtype=torch.float64), len(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "_COLLECTED_WHOLE", 4)
        memory = None if bracket is None else torch.tensor(bracket)
        _assert_found(select_magnitude(_Given(matrix), rank, memory), matrix, int(rank))


def test_a_warm_bracket_needs_one_pass_and_a_wrong_one_three() -> None:
    values = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)).abs()
    rank = threshold_rank(torch.tensor(0.9, dtype=torch.float64), values.numel())
    memory = torch.full((2,), math.nan)
    passes = []
    for scale in (1.0, 1.005, 1.01, 1.0, 3.0, 3.0, 3.0):
        moved = _Given(values * scale)
        tau = select_magnitude(moved, rank, memory)
        _assert_found(tau, values * scale, int(rank))
        passes.append(moved.num_passes)
    # Where 3.0 comes the bracket is wrong, and the move too wide to foresee: then a sample finds the next.
    assert passes == [1, 1, 1, 1, 3, 1, 1]
    low, high = memory.tolist()
    assert low < float(tau) < high
    assert high / low < 1.1


def test_a_call_for_the_same_factors_keeps_the_bracket() -> None:
    """An accumulated batch or a checkpoint moves nothing, and says nothing about the next step."""
    values = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)).abs()
    rank = threshold_rank(torch.tensor(0.9, dtype=torch.float64), values.numel())
    memory = torch.full((2,), math.nan)
    passes = []
    for step in range(6):
        for _ in range(4):
            moved = _Given(values * 1.005**step)
            _assert_found(select_magnitude(moved, rank, memory), values * 1.005**step, int(rank))
            passes.append(moved.num_passes)
    assert passes == [1] * 24


def test_a_sample_finds_the_bracket_of_a_layer_as_initialised() -> None:
    """Without a memory too one pass is enough: over rows and columns that differ in length by a factor of 3."""
    generator = torch.Generator().manual_seed(0)
    row_sizes = torch.linspace(0.5, 1.5, 700)[:, None]
    values = (torch.randn(700, 900, generator=generator) * row_sizes).abs()
    for sparsity in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0):
        rank = threshold_rank(torch.tensor(sparsity, dtype=torch.float64), values.numel())
        matrix = _Given(values, tile_columns=100)
        _assert_found(select_magnitude(matrix, rank), values, int(rank))
        assert matrix.num_passes == 1


def test_shards_find_the_threshold_of_the_whole() -> None:
    """Three shards in lockstep, as three ranks with an all-reduce would be."""
    values = torch.randn(60, 50, generator=torch.Generator().manual_seed(0)).abs()
    shards = values.split([10, 45, 5])
    rank = threshold_rank(torch.tensor(0.7, dtype=torch.float64), values.numel())
    barrier = threading.Barrier(len(shards))
    exchanged: dict[int, Tensor] = {}
    found: dict[int, Tensor] = {}

    def run(index: int) -> None:
        def sum_counts(counts: Tensor) -> None:
            exchanged[index] = counts.clone()
            barrier.wait()
            counts.copy_(torch.stack(list(exchanged.values())).sum(0))
            barrier.wait()

        tiles = _Given(shards[index]).tiles
        found[index] = select_by_digits(tiles, rank, dtype=torch.float32, sum_counts=sum_counts)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(shards)
    for tau in found.values():
        _assert_found(tau, values, int(rank))


def test_more_elements_than_float32_can_count() -> None:
    """2^24 + 2 entries, in descending order: an index rounded to float32 would be off by one."""
    count = 2**24 + 2
    values = torch.arange(count, 0, -1, dtype=torch.int32)[None]
    keys = _Given(values.view(torch.float32), tile_columns=1 << 20)
    for position in (count - 1, count - 2, 2**24 - 1):
        rank = torch.tensor(position)
        for tau in (select_magnitude(keys, rank), select_by_digits(keys.tiles, rank, dtype=torch.float32)):
            assert int(tau.view(torch.int32)) == position + 1


@pytest.mark.parametrize("num_entries", [2**24 + 1, 2**31 + 7, 2**40])
@pytest.mark.parametrize("sparsity", [0.1, 0.9, 0.999999999])
def test_the_index_is_exact_at_any_size(num_entries: int, sparsity: float) -> None:
    rank = threshold_rank(torch.tensor(sparsity, dtype=torch.float64), num_entries)
    assert int(rank) == int(np.floor(np.float64(sparsity) * (num_entries - 1)))


def test_more_than_2_to_31_entries_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts and positions beyond int32: every entry of a small tile counted 2^21 times, 2^31 + 2^21 in all."""
    tile = torch.arange((1 << 10) + 1, dtype=torch.int32).view(torch.float32)
    count = threshold._digit_counts
    monkeypatch.setattr(
        threshold, "_digit_counts", lambda keys, prefix, **place: count(keys, prefix, **place) << 21
    )
    for position in (0, (1 << 31) - 1, 1 << 31, (1 << 31) + (1 << 21) - 1):
        tau = select_by_digits(lambda: [tile], torch.tensor(position), dtype=torch.float32)
        assert int(tau.view(torch.int32)) == position >> 21


@pytest.mark.parametrize("sparsity", [-0.5, 1.5, math.nan])
def test_a_sparsity_out_of_range_stays_inside_the_matrix(sparsity: float) -> None:
    rank = threshold_rank(torch.tensor(sparsity, dtype=torch.float64), 10)
    assert int(rank) == (9 if sparsity > 1 else 0)


def test_off_the_cpu_nothing_is_read_back() -> None:
    """On the meta device every read of a value raises."""
    values = torch.empty(20, 30, device="meta")
    rank = threshold_rank(torch.empty((), dtype=torch.float64, device="meta"), 600)
    assert select_magnitude(_Given(values), rank, torch.empty(2, device="meta")).shape == ()


def test_the_memory_changes_nothing_but_itself() -> None:
    case = make_case(groups=2, rows=300, num_in=400, dtype=torch.float32, sparsity=[0.3, 0.9])
    arguments = (case.x, case.weight, case.A, case.B, case.bias)
    expected = merge_linear(*arguments, **case.settings)
    memory = torch.full((2, 2), math.nan)
    for _ in range(3):
        assert torch.equal(merge_linear(*arguments, threshold_memory=memory, **case.settings), expected)
    for bracket, sparsity, K in zip(
        memory.tolist(),
        (0.3, 0.9),
        delta_weight(case.A, case.B, **{**case.settings, "sparsity": None}).detach().split(300),
        strict=True,
    ):
        tau = float(K.abs().flatten().sort().values[int(sparsity * (K.numel() - 1))])
        assert bracket[0] < tau < bracket[1]


def test_nan_in_the_factors_reaches_the_output_and_raises_nothing() -> None:
    """In the hot path nobody looks: the loss becomes NaN, and the run ends as diverged."""
    case = make_case(dtype=torch.float32)
    case.A.detach()[0, 0, 3, 0] = math.nan
    memory = torch.full((1, 2), math.nan)
    y = merge_linear(case.x, case.weight, case.A, case.B, case.bias, threshold_memory=memory, **case.settings)
    assert y.isnan().any()
    y.backward(case.dy)
