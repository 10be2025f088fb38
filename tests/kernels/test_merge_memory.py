"""The op's transient memory: bounded by its setting whatever the layer's size, and by little more than a tile."""

import pytest
import torch
from torch import Tensor

from snell_scale.kernels.merge import merge_conv2d, merge_linear

from .live_bytes import LiveBytes
from .merge_cases import KERNEL_NAMES, MergeCase, make_case

ROWS, NUM_IN = 300, 10_000
MATRIX_BYTES = ROWS * NUM_IN * 4
# x, y, dy, dx of two tokens, copies of the factors and of their gradients: 4 x (300 + 10000) numbers, ten times.
SMALL_BYTES = 40 * 4 * (ROWS + NUM_IN)
# The counts of 16-bit digits, which a threshold may have to fall back on, twice.
COUNTS_BYTES = 2 * 8 * 2**16


def _peaks(case: MergeCase, limit_bytes: int, dtype: torch.dtype = torch.float32) -> tuple[int, int, int]:
    """The peak bytes of forward and of backward, and what lives between them."""
    x, weight, bias = (tensor.detach().to(dtype) for tensor in (case.x, case.weight, case.bias))
    x.requires_grad_()
    dy = case.dy.to(dtype)
    existing = [x, weight, bias, dy, *case.leaves().values()]
    in_forward, in_backward = LiveBytes(existing), LiveBytes(existing)
    with in_forward:
        y = merge_linear(x, weight, case.A, case.B, bias, transient_limit_bytes=limit_bytes, **case.settings)
    with in_backward:
        y.backward(dy)
    return in_forward.peak, in_backward.peak, in_forward.live


def _wide_case(kernel: str, *, groups: int = 1, sparsity: float | None = 0.9) -> MergeCase:
    return make_case(
        kernel, groups=groups, rows=ROWS, num_in=NUM_IN, num_tokens=2, sparsity=sparsity, dtype=torch.float32
    )


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_bounds_what_is_held_for_a_while(kernel: str, groups: int, dtype: torch.dtype) -> None:
    """A matrix of 11 MiB (34 with three groups) under limits of two megabytes and of one."""
    for limit_bytes in (2**21, 2**20):
        peaks = _peaks(_wide_case(kernel, groups=groups), limit_bytes, dtype)
        assert max(peaks) <= limit_bytes + groups * SMALL_BYTES + COUNTS_BYTES
        assert peaks[2] <= groups * SMALL_BYTES
    # What the bound excludes: a single tensor of the matrix's size.
    assert 2**20 + 3 * SMALL_BYTES + COUNTS_BYTES < MATRIX_BYTES


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_by_default_a_layer_of_any_size_stays_below_64_mib(sparsity: float | None) -> None:
    """4096 x 6144 is 96 MiB in float32."""
    case = make_case(rows=4096, num_in=6144, num_tokens=1, sparsity=sparsity, dtype=torch.float32)
    forward, backward, _ = _peaks(case, 64 * 2**20)
    assert max(forward, backward) <= 64 * 2**20 + SMALL_BYTES + COUNTS_BYTES


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("weighting", ["magnitude", "soft", "hard"])
@pytest.mark.parametrize("groups", [1, 2])
def test_many_tiles_and_ranges_give_what_one_gives(kernel: str, weighting: str, groups: int) -> None:
    """13 KiB: tiles of a few columns, ranges of one or two tiles, the last of each narrower than the others."""

    def gradients(limit_bytes: int) -> dict[str, Tensor]:
        case = make_case(kernel, weighting=weighting, groups=groups, rows=9, num_in=101, sparsity=0.7)
        y = merge_linear(
            case.x,
            case.weight,
            case.A,
            case.B,
            case.bias,
            transient_limit_bytes=limit_bytes,
            **case.settings,
        )
        return case.gradients(y)

    whole, in_parts = gradients(2**26), gradients(13 * 2**10)
    for name, expected in whole.items():
        torch.testing.assert_close(in_parts[name], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("limit_bytes", [1, 20_000])
@pytest.mark.parametrize("window", [(3, 3), (1, 2)])
def test_a_convolution_in_parts_is_cut_between_channels(limit_bytes: int, window: tuple[int, int]) -> None:
    channels, height, width = 11, *window
    size = channels * height * width
    case = make_case(rows=6, num_in=size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, 7, 8, generator=generator, dtype=torch.float64)
    case.x = x.requires_grad_()
    case.weight = case.weight.detach().view(6, channels, *window).requires_grad_()
    merged = case.weight + case.reference_delta().view(case.weight.shape)
    expected = torch.nn.functional.conv2d(case.x, merged, case.bias)
    case.dy = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    y = merge_conv2d(
        case.x,
        case.weight,
        case.A,
        case.B,
        case.bias,
        transient_limit_bytes=limit_bytes,
        **case.settings,
    )
    found = case.gradients(y)
    for name, gradient in case.gradients(expected).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-12)


def test_a_convolutions_weight_in_channels_last_order_is_not_copied() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 1200, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    case = make_case(rows=300, num_in=1200 * 9, dtype=torch.float32)
    x = torch.randn(1, 1200, 3, 3, generator=generator)
    with LiveBytes([weight, x, *case.leaves().values()]) as counted:
        merge_conv2d(x, weight, case.A, case.B, transient_limit_bytes=2**21, **case.settings)
    assert counted.peak <= 2**21 + SMALL_BYTES + COUNTS_BYTES < weight.numel() * 4 / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_partial_sums_in_low_precision_are_rounded_once(dtype: torch.dtype) -> None:
    """y summed over 40 ranges is as near the truth as y in one product, up to the order of summation."""
    case = make_case(rows=16, num_in=640, num_tokens=32, sparsity=0.5, dtype=torch.float32)
    x, weight, bias = (tensor.detach().to(dtype) for tensor in (case.x, case.weight, case.bias))
    truth = torch.nn.functional.linear(
        x.double(), (weight + case.reference_delta().detach()).to(dtype).double(), bias.double()
    )
    errors = []
    for limit_bytes in (2**26, 16 * 1024):
        y = merge_linear(x, weight, case.A, case.B, bias, transient_limit_bytes=limit_bytes, **case.settings)
        assert y.dtype == dtype
        errors.append((y.double() - truth).norm().item())
    assert errors[1] <= 1.05 * errors[0]
