"""Triton kernels that select τ, the rank-th smallest of |K|, from recomputed tiles; launched by triton_impl.py.

A magnitude's key is its bit pattern as an integer: for non-negative floats it has their order, and NaN is above
inf. One pass counts what lies below a bracket and collects what lies inside. Where the bracket held the rank,
`_select_kernel` finds it by bisection among the collected keys. Otherwise two more passes count the keys' upper
16 and lower 15 bits. Every decision is made on the device. The counts are integers, so the order of the atomic
additions changes nothing.
"""

# A call of a jitted function is typed NoReturn, for outside of a kernel it raises.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .triton_kernels import kernel_values, program_tile

UPPER_BINS: tl.constexpr = tl.constexpr(65536)
LOWER_BINS: tl.constexpr = tl.constexpr(32768)
LOWER_BITS: tl.constexpr = tl.constexpr(15)
LARGEST_INT: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _sample_kernel(
    sample_ptr, sample_size, a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, num_rows, num_columns,
    num_blocks, KERNEL: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sample (G, sample_size) = |K| at pairs drawn with replacement from a counter, the same in every call."""
    group, block, _ = program_tile(num_blocks, 1)
    draws = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    rows = (tl.randint(0, draws).to(tl.int32, bitcast=True) & LARGEST_INT) % num_rows
    columns = (tl.randint(1, draws).to(tl.int32, bitcast=True) & LARGEST_INT) % num_columns
    K, _, _, _ = kernel_values(
        a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, group, rows, columns,
        num_rows, num_columns, KERNEL, H, Q,
    )  # fmt: skip
    tl.store(sample_ptr + group.to(tl.int64) * sample_size + draws, tl.abs(K), mask=draws < sample_size)


@triton.jit
def _collect_kernel(
    counts_ptr, candidates_ptr, capacity, bracket_ptr,
    a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, num_rows, num_columns,
    num_row_blocks, num_column_blocks,
    KERNEL: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """counts (G, 2) += how many keys lie below and inside the bracket (G, 2); the latter go to candidates.

    candidates (G, capacity) int32 takes the first that come; counts tells whether all of them fitted.
    """
    group, row_block, column_block = program_tile(num_row_blocks, num_column_blocks)
    lower = tl.load(bracket_ptr + 2 * group)
    if lower == lower:
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        K, _, _, _ = kernel_values(
            a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, group, rows, columns,
            num_rows, num_columns, KERNEL, H, Q,
        )  # fmt: skip
        keys = _keys(K)
        mask = (rows < num_rows) & (columns < num_columns)
        lower_key = _keys(lower)
        is_inside = mask & (keys >= lower_key) & (keys <= _keys(tl.load(bracket_ptr + 2 * group + 1)))
        num_below = tl.sum((mask & (keys < lower_key)).to(tl.int32))
        tl.atomic_add(counts_ptr + 2 * group, num_below.to(tl.int64), sem="relaxed")
        flat = tl.reshape(is_inside.to(tl.int32), (BLOCK_M * BLOCK_N,))
        ends = tl.cumsum(flat)
        start = tl.atomic_add(counts_ptr + 2 * group + 1, tl.sum(flat).to(tl.int64), sem="relaxed")
        positions = start + (ends - flat)
        pointers = candidates_ptr + group.to(tl.int64) * capacity + positions
        tl.store(pointers, tl.reshape(keys, (BLOCK_M * BLOCK_N,)), mask=(flat > 0) & (positions < capacity))


@triton.jit
def _select_kernel(
    taus_ptr, is_found_ptr, counts_ptr, candidates_ptr, capacity, bracket_ptr, ranks_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per group: τ from the candidates, if all of them were collected and the rank is among them.

    The first BLOCK candidates stay in registers; after a step of training there are rarely more.
    """
    group = tl.program_id(0).to(tl.int64)
    lower = tl.load(bracket_ptr + 2 * group)
    rank = tl.load(ranks_ptr + group) - tl.load(counts_ptr + 2 * group)
    count = tl.load(counts_ptr + 2 * group + 1)
    is_found = (lower == lower) & (rank >= 0) & (rank < count) & (count <= capacity)
    tl.store(is_found_ptr + group, is_found.to(tl.int32))
    if is_found:
        candidates_ptr += group * capacity
        places = tl.arange(0, BLOCK)
        first = tl.load(candidates_ptr + places, mask=places < count, other=LARGEST_INT)
        smallest = _keys(lower)
        largest = _keys(tl.load(bracket_ptr + 2 * group + 1))
        while smallest < largest:
            middle = smallest + (largest - smallest) // 2
            num_up_to = tl.sum((first <= middle).to(tl.int32))
            for start in range(BLOCK, count.to(tl.int32), BLOCK):
                keys = tl.load(candidates_ptr + start + places, mask=start + places < count, other=LARGEST_INT)
                num_up_to += tl.sum((keys <= middle).to(tl.int32))
            if num_up_to > rank:
                largest = middle
            else:
                smallest = middle + 1
        tl.store(taus_ptr + group, smallest.to(tl.float32, bitcast=True))


@triton.jit
def _histogram_kernel(
    bins_ptr, upper_ptr, is_found_ptr,
    a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, num_rows, num_columns,
    num_row_blocks, num_column_blocks, IS_UPPER: tl.constexpr,
    KERNEL: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Counts keys by their upper 16 bits, or by the lower 15 those with the upper bits that hold the rank.

    bins (G, UPPER_BINS or LOWER_BINS) int64. Nothing where the group's τ is found already.
    """
    group, row_block, column_block = program_tile(num_row_blocks, num_column_blocks)
    if tl.load(is_found_ptr + group) == 0:
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        K, _, _, _ = kernel_values(
            a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, group, rows, columns,
            num_rows, num_columns, KERNEL, H, Q,
        )  # fmt: skip
        keys = _keys(K)
        mask = (rows < num_rows) & (columns < num_columns)
        if IS_UPPER:
            bins = keys >> LOWER_BITS
            bins_ptr += group.to(tl.int64) * UPPER_BINS
        else:
            bins = keys & (LOWER_BINS - 1)
            bins_ptr += group.to(tl.int64) * LOWER_BINS
            mask = mask & ((keys >> LOWER_BITS) == tl.load(upper_ptr + 2 * group).to(tl.int32))
        tl.atomic_add(bins_ptr + bins, tl.full(bins.shape, 1, tl.int64), mask=mask, sem="relaxed")


@triton.jit
def _find_upper_kernel(upper_ptr, is_found_ptr, bins_ptr, ranks_ptr, BLOCK: tl.constexpr):
    """One program per group: upper (G, 2) = the bin of the rank, and how many keys lie in the bins before it."""
    group = tl.program_id(0).to(tl.int64)
    if tl.load(is_found_ptr + group) == 0:
        bins_ptr += group * UPPER_BINS
        digit, num_before = _bin_of_rank(bins_ptr, tl.load(ranks_ptr + group), UPPER_BINS, BLOCK)
        tl.store(upper_ptr + 2 * group, digit.to(tl.int64))
        tl.store(upper_ptr + 2 * group + 1, num_before)


@triton.jit
def _finish_kernel(
    taus_ptr, memory_ptr, upper_ptr, counts_ptr, is_found_ptr, bins_ptr, bracket_ptr, ranks_ptr, capacity,
    HAS_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per group: τ from both digits if it is not found yet; and the next call's bracket.

    The bracket is τ ± 3 times its last movement, between 0.1 % and 3 % of τ, but so narrow that about an eighth
    of the candidates' capacity will be used: from the density in the last bracket or among the keys just counted.
    """
    group = tl.program_id(0).to(tl.int64)
    lower = tl.load(bracket_ptr + 2 * group)
    upper = tl.load(bracket_ptr + 2 * group + 1)
    tau = tl.load(taus_ptr + group)
    num_each_side = tl.maximum(capacity // 16, 1)
    if tl.load(is_found_ptr + group) == 0:
        bins_ptr += group * LOWER_BINS
        first_key = tl.load(upper_ptr + 2 * group).to(tl.int32) << LOWER_BITS
        rank = tl.load(ranks_ptr + group) - tl.load(upper_ptr + 2 * group + 1)
        digit, _ = _bin_of_rank(bins_ptr, rank, LOWER_BINS, BLOCK)
        tau = (first_key + digit).to(tl.float32, bitcast=True)
        tl.store(taus_ptr + group, tau)
        digit, _ = _bin_of_rank(bins_ptr, rank - num_each_side, LOWER_BINS, BLOCK)
        below = tau - (first_key + digit).to(tl.float32, bitcast=True)
        digit, _ = _bin_of_rank(bins_ptr, rank + num_each_side, LOWER_BINS, BLOCK)
        above = (first_key + digit).to(tl.float32, bitcast=True) - tau
        # A side with fewer keys than that in these bins says nothing.
        below = tl.where(rank < num_each_side, float("inf"), below)
        above = tl.where(digit == LOWER_BINS, float("inf"), above)
        limit = tl.minimum(below, above)
    else:
        count = tl.load(counts_ptr + 2 * group + 1).to(tl.float32)
        limit = (upper - lower) * (num_each_side / count)
    if HAS_MEMORY:
        is_known = (lower == lower) & (upper < float("inf"))
        moved = tl.abs(tau - (lower + upper) * 0.5)
        half = tl.where(is_known, tl.minimum(tl.maximum(3.0 * moved, 0.001 * tau), 0.03 * tau), 0.01 * tau)
        # Called again for the same factors (an accumulated batch, a checkpoint's recomputation): no news.
        half = tl.where(is_known & (moved <= 1e-6 * tau), (upper - lower) * 0.5, half)
        half = tl.minimum(half, limit)
        tl.store(memory_ptr + 2 * group, tau - half)
        tl.store(memory_ptr + 2 * group + 1, tau + half)


@triton.jit
def _bin_of_rank(bins_ptr, rank, NUM_BINS: tl.constexpr, BLOCK: tl.constexpr):
    """The bin that holds the rank-th (from 0) counted key, and how many lie in the bins before it."""
    digit = 0
    num_before = tl.full((), 0, tl.int64)
    num_seen = tl.full((), 0, tl.int64)
    for start in range(0, NUM_BINS, BLOCK):
        counts = tl.load(bins_ptr + start + tl.arange(0, BLOCK))
        ends = num_seen + tl.cumsum(counts)
        is_before = ends <= rank
        digit += tl.sum(is_before.to(tl.int32))
        num_before = tl.maximum(num_before, tl.max(tl.where(is_before, ends, 0)))
        num_seen += tl.sum(counts)
    return digit, num_before


@triton.jit
def _keys(values):
    return tl.abs(values).to(tl.int32, bitcast=True)
