"""The op in torch operations, tile by tile: for CPU, and for any device without Triton.

A tile is some columns of one of the G matrices, with all its rows, and small enough for the cache. Thresholds,
merged weight and gradients compute K in the same tiles, so that the mask is the same bit for bit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .delta import Delta, Wanted
from .numerics import host_number
from .pair_kernels import PAIR_KERNELS, PairKernel
from .threshold import select_magnitude, threshold_rank

# Half a MiB of float32: what is live of a tile stays in the caches. But no narrower than six cache lines where
# the limit allows, for the tile of W0 is read row by row.
_TILE_ENTRIES, _TILE_COLUMNS = 1 << 17, 96
# The most buffers of a tile's size that are live at once (SNELLA's backward, two components).
_TILE_BUFFERS = 12


def find_thresholds(delta: Delta, sparsity: Tensor, memory: Tensor | None, *, tile_columns: int) -> Tensor:
    """τ of each matrix, (G,), in the dtype of K. sparsity (G,) float64; memory (G, 2), see threshold.py."""
    ranks = threshold_rank(sparsity, delta.num_entries)
    taus, kernel = [], PAIR_KERNELS[delta.kernel](delta, Wanted())
    for group in range(delta.num_groups):
        magnitudes = _Magnitudes(delta, kernel, group, tile_columns=tile_columns)
        taus.append(select_magnitude(magnitudes, ranks[group], None if memory is None else memory[group]))
    return torch.stack(taus)


def tile_columns_of(delta: Delta, limit_bytes: int) -> int:
    """Columns of a tile whose buffers take at most `limit_bytes` together, a multiple of delta.column_step."""
    most = limit_bytes // (_TILE_BUFFERS * delta.A.element_size() * delta.num_rows)
    columns = min(most, max(_TILE_ENTRIES // delta.num_rows, _TILE_COLUMNS))
    step = delta.column_step
    # Vectors of 16 numbers, where that leaves anything.
    step *= 16 if columns >= 16 * step else 1
    return min(max(columns // step, 1) * step, delta.num_columns)


class TorchMerge:
    """One call's walk over the columns: writes W0 + ΔW, and sums the gradients of the factors."""

    def __init__(self, delta: Delta, taus: Tensor | None, wanted: Wanted, *, tile_columns: int) -> None:
        self._delta = delta
        self._taus: Sequence[Tensor | None] = [None] * delta.num_groups if taus is None else list(taus)
        self._kernel = PAIR_KERNELS[delta.kernel](delta, wanted)
        self._tile_columns = tile_columns

    def visit(self, columns: slice, *, weight: Tensor | None, merged: Tensor | None, G: Tensor | None) -> None:
        """Writes (W0 + ΔW)[:, columns] into `merged`, and adds what G = ∂L/∂W[:, columns] gives the factors.

        merged, G: (out, len(columns)) or None. weight W0: as the layer has it, or None for ΔW alone. A range of
        columns begins at a multiple of the tile's width.
        """
        if merged is None and G is None:
            return
        num_rows = self._delta.num_rows
        for tile in _tiles(columns, self._tile_columns):
            here = slice(tile.start - columns.start, tile.stop - columns.start)
            for group, tau in enumerate(self._taus):
                rows = slice(group * num_rows, (group + 1) * num_rows)
                K = self._kernel.tile(group, tile)
                gate = None if tau is None else _gate(K, tau, self._delta.weighting)
                if merged is not None:
                    base = None if weight is None else self._base_tile(weight, rows, tile)
                    _write_merged(merged[rows, here], base, K, gate)
                if G is not None:
                    self._kernel.add_gradients(group, _gated(G[rows, here], gate, K.dtype), tile)

    def _base_tile(self, weight: Tensor, rows: slice, tile: slice) -> Tensor:
        """W0's entries of a tile; of a convolution's weight in channels-last order never more is copied."""
        if weight.dim() == 2:
            return weight[rows, tile]
        step = self._delta.column_step
        return weight[rows, tile.start // step : tile.stop // step].flatten(1)

    def gradients(self) -> list[Tensor | None]:
        """Of A, B and the kernel's parameters, in the shapes of Delta; None where not wanted."""
        return self._kernel.finish()


class _Magnitudes:
    """|K| of one matrix, see threshold.Magnitudes."""

    def __init__(self, delta: Delta, kernel: PairKernel, group: int, *, tile_columns: int) -> None:
        self.dtype = delta.A.dtype
        self.num_rows, self.num_columns = delta.num_rows, delta.num_columns
        self.tile_entries = delta.num_rows * tile_columns
        self._delta, self._kernel, self._group = delta, kernel, group
        self._tile_columns = tile_columns

    def tiles(self) -> Iterator[Tensor]:
        for tile in _tiles(slice(0, self.num_columns), self._tile_columns):
            yield self._kernel.tile(self._group, tile).abs_()

    def sample(self, rows: Tensor, columns: Tensor) -> Tensor:
        group = slice(self._group, self._group + 1)
        A, B = self._delta.A[group, :, columns], self._delta.B[group, :, rows]
        params = [param[group] for param in self._delta.params]
        if self._delta.kernel == "mixk":
            # A softmax over fewer rows gives each a larger share; alpha multiplies the shares.
            params[0] = params[0] * (len(rows) / self.num_rows)
        sampled = replace(self._delta, A=A, B=B, params=params)
        return PAIR_KERNELS[sampled.kernel](sampled, Wanted()).tile(0, slice(0, len(columns))).abs_()


def _tiles(columns: slice, width: int) -> Iterator[slice]:
    for start in range(columns.start, columns.stop, width):
        yield slice(start, min(start + width, columns.stop))


def _gate(K: Tensor, tau: Tensor, weighting: str) -> Tensor:
    """g ⊙ M, a new tensor."""
    if K.device.type == "cpu" and math.isfinite(known := host_number(tau, without_values=1.0)):
        return _gate_by_shrinking(K, known, weighting)
    magnitudes = K.abs()
    survives = magnitudes > tau
    if weighting == "hard":
        return survives.to(K.dtype)
    if weighting == "soft":
        magnitudes.sub_(tau)
    return magnitudes.mul_(survives)


def _gate_by_shrinking(K: Tensor, tau: float, weighting: str) -> Tensor:
    """The same in fewer and vectorised passes, for a τ that the host knows: shrinking is masking.

    On CPU a boolean mask costs four times a pass over floats.
    """
    if weighting == "soft":
        return torch.nn.functional.softshrink(K, tau).abs_()
    shrunk = torch.nn.functional.hardshrink(K, tau)
    return shrunk.ne_(0) if weighting == "hard" else shrunk.abs_()


def _write_merged(merged: Tensor, base: Tensor | None, K: Tensor, gate: Tensor | None) -> None:
    """merged = base + K ⊙ gate, rounded once; K and gate stay as they are."""
    if gate is not None and base is not None and base.dtype == K.dtype == merged.dtype:
        torch.addcmul(base, K, gate, out=merged)
        return
    delta = K if gate is None else K * gate
    if base is None:
        merged.copy_(delta)
    else:
        torch.add(base, delta, out=merged)


def _gated(G: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """∂L/∂K = G ⊙ g ⊙ M, a new tensor or written into `gate`."""
    return G.to(dtype, copy=True) if gate is None else torch.mul(G, gate, out=gate)
