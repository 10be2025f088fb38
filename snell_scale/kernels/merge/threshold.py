"""From a sparsity to the exact threshold τ: the ⌊s(N−1)⌋-th smallest of N magnitudes, without sorting them."""

import torch
from torch import Tensor

# Elements counted at a time: bounds the int64 scratch (8 bytes each), and no index nears 2^31.
_CHUNK_ELEMENTS = 1 << 24
_DIGIT_BITS = 11


def magnitude_threshold(magnitudes: Tensor, sparsity: float | Tensor) -> Tensor:
    """τ, a 0-d tensor on the magnitudes' device, bit-equal to one of them.

    magnitudes: |K| >= 0, any shape, float32 or float64. sparsity: a float, or a 0-d float64 tensor on any device;
    it is clamped to [0, 1], and 1 gives the largest magnitude, so that nothing lies above it.
    NaN counts as larger than everything. Off-CPU nothing is read back to the host.
    """
    if not isinstance(sparsity, Tensor):
        sparsity = torch.full((), sparsity, dtype=torch.float64, device=magnitudes.device)
    # A number from pageable host memory is staged at once: non_blocking spares the wait for the stream.
    rank = threshold_rank(sparsity.to(magnitudes.device, non_blocking=True), magnitudes.numel())
    select = select_by_partition if magnitudes.device.type == "cpu" else select_by_histograms
    return select(magnitudes, rank)


def threshold_rank(sparsity: Tensor, num_elements: int) -> Tensor:
    """⌊s(N−1)⌋, 0-based, clamped to [0, N−1]: 0-d int64 on the sparsity's device.

    Computed in float64: float32 cannot hold the index of a matrix with more than 2^24 elements.
    """
    last = num_elements - 1
    return (sparsity.to(torch.float64) * last).floor().to(torch.int64).clamp(0, last)


@torch.library.custom_op("snell_scale::select_by_partition", mutates_args=(), device_types="cpu")
def select_by_partition(magnitudes: Tensor, rank: Tensor) -> Tensor:
    """The rank-th smallest on CPU: introselect on one copy. A registered op, so tracing does not look inside.

    numpy's is vectorised: 27 times faster than torch.kthvalue on 6.5 M floats, and no int64 index array.
    """
    values = magnitudes.numpy().reshape(-1).copy()
    position = int(rank)
    values.partition(position)
    return torch.tensor(values[position], dtype=magnitudes.dtype)


@select_by_partition.register_fake
def _(magnitudes: Tensor, rank: Tensor) -> Tensor:
    return magnitudes.new_empty(())


def select_by_histograms(magnitudes: Tensor, rank: Tensor) -> Tensor:
    """The rank-th smallest on any device, all on the device: radix selection, most significant digit first.

    The bits of non-negative IEEE floats, read as integers, are in the order of the floats. Each pass counts the
    next 11-bit digit among the keys that share the digits found so far: 3 passes for float32, 6 for float64.
    """
    key_type, num_bits = (torch.int64, 63) if magnitudes.dtype == torch.float64 else (torch.int32, 31)
    keys = magnitudes.reshape(-1).view(key_type)
    prefix = torch.zeros((), dtype=key_type, device=keys.device)
    while num_bits:
        width = min(_DIGIT_BITS, num_bits)
        num_bits -= width
        counts = _digit_counts(keys, prefix, shift=num_bits, width=width)
        is_below = counts.cumsum(0) <= rank
        rank = rank - (counts * is_below).sum()
        prefix = (prefix << width) | is_below.sum().to(key_type)
    return prefix.view(magnitudes.dtype)


def _digit_counts(keys: Tensor, prefix: Tensor, *, shift: int, width: int) -> Tensor:
    """How many keys that start with `prefix` have each value of the next digit: (2^width,) int64."""
    num_digits = 1 << width
    counts = torch.zeros(num_digits + 1, dtype=torch.int64, device=keys.device)
    one = torch.ones(1, dtype=torch.int64, device=keys.device)
    for chunk in keys.split(_CHUNK_ELEMENTS):
        leading = chunk >> shift
        digits = torch.where((leading >> width) == prefix, leading & (num_digits - 1), num_digits)
        counts.scatter_add_(0, digits.to(torch.int64), one.expand(chunk.numel()))
    return counts[:-1]
