"""The threshold is exact: both selections against a sort, at every odd input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snell_scale.kernels.merge import threshold
from snell_scale.kernels.merge.threshold import (
    magnitude_threshold,
    select_by_histograms,
    select_by_partition,
    threshold_rank,
)

SPARSITIES = [0.0, 1e-12, 0.3, 0.5, 0.9, 0.999999, 1 - 2**-53, 1.0]


def _values(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    smallest = torch.finfo(dtype).smallest_normal
    return {
        "spread": torch.randn(37, 41, generator=generator, dtype=dtype).abs(),
        "many magnitudes": torch.exp(20 * torch.randn(1000, generator=generator, dtype=dtype)),
        "ties": torch.randint(0, 4, (999,), generator=generator).to(dtype),
        "all equal": torch.full((64,), 0.1, dtype=dtype),
        "all zero": torch.zeros(64, dtype=dtype),
        "one element": torch.tensor([[0.3]], dtype=dtype),
        "two elements": torch.tensor([0.7, 0.3], dtype=dtype),
        "neighbours": (torch.ones(50, dtype=dtype) + torch.arange(50) * torch.finfo(dtype).eps).flip(0),
        "subnormal": torch.arange(1, 40, dtype=dtype).flip(0) * smallest / 64,
        "infinite": torch.tensor([1.0, float("inf"), 0.0, float("inf"), 2.0], dtype=dtype),
        "not a number": torch.tensor([1.0, float("nan"), 0.0, -float("nan"), 2.0], dtype=dtype).abs(),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_both_selections_equal_the_sort(name: str, dtype: torch.dtype, sparsity: float) -> None:
    values = _values(name, dtype)
    rank = int(sparsity * (values.numel() - 1))
    expected = values.flatten().sort().values[rank]
    for select in (select_by_partition, select_by_histograms):
        tau = select(values, torch.tensor(rank))
        assert tau.shape == ()
        assert tau.dtype == dtype
        torch.testing.assert_close(tau, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(magnitude_threshold(values, sparsity), expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(0, width=32), min_size=1, max_size=60),
    sparsity=st.floats(0, 1),
    is_double=st.booleans(),
)
def test_any_values(values: list[float], sparsity: float, is_double: bool) -> None:
    magnitudes = torch.tensor(values, dtype=torch.float64 if is_double else torch.float32)
    rank = threshold_rank(torch.tensor(sparsity, dtype=torch.float64), len(values))
    expected = magnitudes.sort().values[rank]
    assert torch.equal(select_by_partition(magnitudes, rank), expected)
    assert torch.equal(select_by_histograms(magnitudes, rank), expected)


def test_histograms_are_summed_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "_CHUNK_ELEMENTS", 7)
    values = torch.rand(100, generator=torch.Generator().manual_seed(0))
    for rank in (0, 1, 50, 98, 99):
        assert torch.equal(select_by_histograms(values, torch.tensor(rank)), values.sort().values[rank])


def test_more_elements_than_float32_can_count() -> None:
    """The i-th smallest of these is the float whose bits are i, so an index that is 1 off would show."""
    num_elements = 2**24 + 5
    values = torch.arange(num_elements, dtype=torch.int32).flip(0).view(torch.float32)
    for rank in (2**24 + 1, 2**24 + 3):
        for select in (select_by_partition, select_by_histograms):
            assert select(values, torch.tensor(rank)).view(torch.int32).item() == rank


@pytest.mark.parametrize("num_elements", [1, 2, 2**24 + 3, 2**31 + 1, 2**33 + 7])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_index_is_exact_at_any_size(num_elements: int, sparsity: float) -> None:
    rank = threshold_rank(torch.tensor(sparsity, dtype=torch.float64), num_elements)
    assert rank.dtype == torch.int64
    assert rank.item() == int(sparsity * (num_elements - 1))


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_a_sparsity_out_of_range_stays_inside_the_matrix(sparsity: float) -> None:
    values = torch.rand(10)
    tau = magnitude_threshold(values, torch.tensor(sparsity, dtype=torch.float64))
    assert tau in values


def test_off_the_cpu_nothing_is_read_back() -> None:
    """Meta tensors have no values: reading one on the host raises."""
    tau = magnitude_threshold(
        torch.empty(30, 40, device="meta"), torch.empty((), dtype=torch.float64, device="meta")
    )
    assert tau.shape == ()
    assert tau.device.type == "meta"
