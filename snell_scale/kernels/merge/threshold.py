"""From a sparsity to the exact threshold τ, the ⌊s(N−1)⌋-th smallest of |K|, with K never whole and never sorted.

The magnitudes come as tiles that are computed again for each pass over them. The bits of non-negative IEEE
floats, read as integers ("keys"), are in the order of the floats, NaN above infinity: so integers are selected.

On CPU the first pass collects what lies in a narrow bracket around where τ was the last time (or where a sample
of entries says it is) and counts what lies below: nearly always τ is among the few collected. If not, and on
other devices always, two passes count 16-bit digits of the keys: exact whatever the values, without a host sync,
and the counts of several shards of a matrix may be summed, so that all of them find the same τ.
"""

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_DIGIT_BITS = 16
# A matrix this small is collected whole; of a larger one up to a sixteenth, 16 MiB of float32 at most.
_COLLECTED_WHOLE, _MOST_COLLECTED = 1 << 16, 1 << 22
_SAMPLE_SIDE = 512  # less where a tile has fewer entries, or nine samples are more than the matrix
_STANDARD_ERRORS = 4
# The next bracket reaches three times τ's last relative move to both sides, within these bounds. A τ that moves
# faster is not predicted but sampled.
_MOVES_COVERED, _LEAST_HALF_WIDTH, _MOST_HALF_WIDTH = 3, 1e-3, 3e-2
_SAME = 1e-6  # the middle of a float32 bracket is τ but for rounding


class Magnitudes(Protocol):
    """|K| of one matrix, computed when asked for. Tensors returned belong to the caller."""

    dtype: torch.dtype
    num_rows: int
    num_columns: int
    tile_entries: int

    def tiles(self) -> Iterable[Tensor]:
        """All entries, in the same tiles with the same bits every time."""
        ...

    def sample(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(len(rows), len(columns)): an estimate of these entries."""
        ...


def threshold_rank(sparsity: Tensor, num_entries: int) -> Tensor:
    """⌊s(N−1)⌋, 0-based, clamped to [0, N−1]: int64, of sparsity's shape and device.

    Computed in float64: float32 cannot hold the index of a matrix with more than 2^24 entries.
    """
    last = num_entries - 1
    return (sparsity.to(torch.float64) * last).floor().to(torch.int64).clamp(0, last)


def select_magnitude(magnitudes: Magnitudes, rank: Tensor, memory: Tensor | None = None) -> Tensor:
    """The rank-th smallest magnitude, 0-d, bit-equal to one of them. rank: 0-d int64 on their device.

    memory: (2,) float, the bracket in which τ is looked for first, NaN when unknown; it is overwritten with the
    next step's. It shortens the search and never changes what is found. NaN counts as larger than everything.
    """
    if rank.device.type != "cpu":
        return select_by_digits(magnitudes.tiles, rank, dtype=magnitudes.dtype)
    if isinstance(rank, FakeTensor):  # no values to look for: only what the tiles take
        for _ in magnitudes.tiles():
            pass
        return rank.new_empty((), dtype=magnitudes.dtype)
    tau = _select_in_bracket(magnitudes, int(rank), memory)
    if tau is None:
        tau = select_by_digits(magnitudes.tiles, rank, dtype=magnitudes.dtype)
    if memory is not None:
        memory.copy_(_next_bracket(float(tau), memory))
    return tau


def select_by_digits(
    tiles: Callable[[], Iterable[Tensor]],
    rank: Tensor,
    *,
    dtype: torch.dtype,
    sum_counts: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The rank-th smallest on any device, all on the device: radix selection, most significant digit first.

    Two passes over the tiles for float32, four for float64. sum_counts: adds up an int64 tensor (65536,) in place
    over the ranks that hold shards of one matrix (an all-reduce); each then finds the τ of the whole, with `rank`
    counted in the whole.
    """
    key_type, num_bits = _keys_of(dtype)
    prefix = torch.zeros((), dtype=key_type, device=rank.device)
    while num_bits:
        width = min(_DIGIT_BITS, num_bits)
        num_bits -= width
        counts = torch.zeros(1 << width, dtype=torch.int64, device=rank.device)
        for tile in tiles():
            counts += _digit_counts(tile.reshape(-1).view(key_type), prefix, shift=num_bits, width=width)
        if sum_counts is not None:
            sum_counts(counts)
        is_below = counts.cumsum(0) <= rank
        rank = rank - (counts * is_below).sum()
        prefix = (prefix << width) | is_below.sum().to(key_type)
    return prefix.view(dtype)


def _digit_counts(keys: Tensor, prefix: Tensor, *, shift: int, width: int) -> Tensor:
    """How many keys that start with `prefix` have each value of the next digit: (2^width,) int64."""
    num_digits = 1 << width
    leading = keys >> shift
    digits = torch.where((leading >> width) == prefix, leading & (num_digits - 1), num_digits)
    counts = torch.zeros(num_digits + 1, dtype=torch.int64, device=keys.device)
    one = torch.ones(1, dtype=torch.int64, device=keys.device)
    return counts.scatter_add_(0, digits.to(torch.int64), one.expand(keys.numel()))[:-1]


def _select_in_bracket(magnitudes: Magnitudes, position: int, memory: Tensor | None) -> Tensor | None:
    """τ if it lies in the bracket and not too much else does. One pass."""
    key_type, num_bits = _keys_of(magnitudes.dtype)
    num_entries = magnitudes.num_rows * magnitudes.num_columns
    low, high, most = 0, (1 << num_bits) - 1, _COLLECTED_WHOLE
    if num_entries > _COLLECTED_WHOLE:
        bracket = None if memory is None else memory.to(magnitudes.dtype)
        if bracket is None or not bool(torch.isfinite(bracket).all()):
            bracket = _sampled_bracket(magnitudes, position)
        low, high = bracket.clamp_min(0).view(key_type).tolist()
        most = min(max(num_entries // 16, _COLLECTED_WHOLE), _MOST_COLLECTED)
    num_below, inside = _collect(magnitudes, low, high, key_type=key_type, most=most)
    if inside is None or not num_below <= position < num_below + len(inside):
        return None
    inside.partition(position - num_below)
    return torch.tensor(low + int(inside[position - num_below]), dtype=key_type).view(magnitudes.dtype)


def _collect(
    magnitudes: Magnitudes, low: int, high: int, *, key_type: torch.dtype, most: int
) -> tuple[int, np.ndarray | None]:
    """How many keys lie below `low`; and those up to `high`, less `low`: None once they are more than `most`."""
    num_below, num_inside = 0, 0
    inside: list[np.ndarray] = []
    for tile in magnitudes.tiles():
        above_low = tile.reshape(-1).view(key_type).sub_(low).numpy()
        if low:
            num_below += int(np.count_nonzero(above_low < 0))
        # As unsigned numbers those below `low` are the largest: one comparison decides.
        unsigned = above_low.view(np.uint64 if key_type == torch.int64 else np.uint32)
        chosen = above_low[np.flatnonzero(unsigned <= high - low)]
        num_inside += len(chosen)
        if num_inside > most:
            return num_below, None
        inside.append(chosen)
    return num_below, np.concatenate(inside)


def _sampled_bracket(magnitudes: Magnitudes, position: int) -> Tensor:
    """Magnitudes (2,) between which τ lies unless a sample of rows and columns misleads.

    Entries of one column (or row) resemble each other: the errors come from the spread of columns and of rows.
    """
    generator = np.random.default_rng(0)
    num_entries = magnitudes.num_rows * magnitudes.num_columns
    most = max(min(_SAMPLE_SIDE, math.isqrt(magnitudes.tile_entries), math.isqrt(num_entries) // 3), 1)
    rows, columns = (
        torch.from_numpy(generator.permutation(side)[:most])
        for side in (magnitudes.num_rows, magnitudes.num_columns)
    )
    values = magnitudes.sample(rows, columns).numpy()
    ordered = np.sort(values, axis=None)
    share = (position + 0.5) / num_entries
    is_below = values < ordered[int(share * len(ordered))]
    variances = [is_below.mean(axis).var() / values.shape[1 - axis] for axis in (0, 1)]
    margin = _STANDARD_ERRORS * np.sqrt(sum(variances)) + 2 / len(ordered)
    first, last = int((share - margin) * len(ordered)), int((share + margin) * len(ordered)) + 1
    low = ordered[first] if first > 0 else 0
    high = ordered[last] if last < len(ordered) else np.inf
    return torch.tensor([low, high], dtype=magnitudes.dtype)


def _next_bracket(tau: float, memory: Tensor) -> Tensor:
    """Where to look for τ the next time: (2,), NaN when that cannot be said."""
    low, high = memory.tolist()
    widest = tau * _MOST_HALF_WIDTH
    half_width = widest  # after an unknown bracket (NaN), which tells no move
    if low == low:
        moved = abs(tau - (low + high) / 2)
        if moved <= tau * _SAME:
            # Called again for the same factors (an accumulated batch, a checkpoint's recomputation): no news.
            return memory
        half_width = max(_MOVES_COVERED * moved, tau * _LEAST_HALF_WIDTH)
    bracket = (tau - half_width, tau + half_width) if half_width <= widest else (math.nan, math.nan)
    return torch.tensor(bracket, dtype=memory.dtype)


def _keys_of(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    return (torch.int64, 63) if dtype == torch.float64 else (torch.int32, 31)
