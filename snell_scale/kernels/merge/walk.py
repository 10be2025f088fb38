"""Forward and backward of the op: a walk over ranges of columns, of which only one is merged at a time."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .delta import Delta, FactorGradients, Wanted
from .numerics import ieee_float32_products, without_autocast
from .products import LinearProduct, Product
from .torch_impl import TorchMerge, find_thresholds, tile_columns_of

DEFAULT_TRANSIENT_LIMIT_BYTES = 64 * 2**20
# On CPU a product with this many columns runs at nearly full speed, and less is live than with more.
_CPU_RANGE_COLUMNS = 256


def thresholds(
    delta: Delta,
    sparsity: Tensor | None,
    memory: Tensor | None,
    *,
    implementation: str,
    transient_limit_bytes: int,
) -> tuple[Tensor | None, Tensor | None]:
    """τ (G,), None when dense; and for mixk under Triton the logarithms of its column sums, (G, in)."""
    with without_autocast(delta.A.device), ieee_float32_products():
        if implementation == "triton":
            from . import triton_impl
            from .threshold import threshold_rank

            logs = triton_impl.column_logs(delta)
            if sparsity is None:
                return None, logs
            ranks = threshold_rank(sparsity, delta.num_entries)
            return triton_impl.find_thresholds(delta, logs, ranks, memory), logs
        if sparsity is None:
            return None, None
        tile_columns = tile_columns_of(delta, transient_limit_bytes // 2)
        return find_thresholds(delta, sparsity, memory, tile_columns=tile_columns), None


class Walk:
    """One call of the op. `taus` and `logs` as `thresholds` returns them."""

    def __init__(
        self,
        delta: Delta,
        taus: Tensor | None,
        logs: Tensor | None,
        *,
        product: Product,
        implementation: str,
        transient_limit_bytes: int,
    ) -> None:
        self._delta = delta
        self._taus, self._logs = taus, logs
        self._product = product
        self._implementation = implementation
        self._limit_bytes = transient_limit_bytes
        self._tile_columns = tile_columns_of(delta, transient_limit_bytes // 2)
        self._num_out = delta.num_groups * delta.num_rows

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """y, in x's dtype. weight W0: (out, in) or a convolution's; None: ΔW alone."""
        x = self._product.prepared(x)
        ranges = self._ranges(x.dtype, num_buffers=1, is_narrow=False)
        # Partial sums over several ranges are added in float32 at least, and rounded once.
        operands = x.dtype if len(ranges) == 1 else torch.promote_types(x.dtype, torch.float32)
        y, bias = None, None if bias is None else bias.to(operands)
        with without_autocast(x.device):
            merge, room = self._merge(Wanted()), self._room(x, ranges)
            for columns in ranges:
                merged = self._part(room, columns)
                with ieee_float32_products():
                    merge.visit(columns, weight=weight, merged=merged, G=None)
                y = self._product.add_output(y, x, merged.to(operands), columns, bias)
        assert y is not None
        return y.to(x.dtype)

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        *,
        x_shape: Sequence[int],
        wants_dx: bool,
        wants_dweight: bool,
        wanted: Wanted,
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """dx, dweight (out, in) and the gradients of A, B and the kernel's parameters, None where not wanted.

        x is needed for dweight and the factors' gradients, weight (if there is one) for dx.
        """
        dy, x = self._product.prepared(dy), None if x is None else self._product.prepared(x)
        dx = None
        whole_G = self._grad_weight(dy, x, slice(0, self._delta.num_columns)) if wants_dweight else None
        with without_autocast(dy.device):
            merge = self._merge(wanted)
            ranges = self._ranges(dy.dtype, num_buffers=wants_dx + wanted.anything, is_narrow=True)
            room = self._room(dy, ranges) if wants_dx else None
            makes_G = wanted.anything and whole_G is None
            room_for_G = self._room(dy, ranges) if makes_G and self._product.writes_grad_weight else None
            for columns in ranges:
                G = None if whole_G is None or not wanted.anything else whole_G[:, columns]
                if makes_G:
                    out = None if room_for_G is None else self._part(room_for_G, columns)
                    G = self._grad_weight(dy, x, columns, out=out)
                merged = None if room is None else self._part(room, columns)
                with ieee_float32_products():
                    merge.visit(columns, weight=weight, merged=merged, G=G)
                del G
                if merged is not None:
                    dx = self._product.add_grad_input(dx, dy, merged, columns, x_shape)
            return dx, whole_G, merge.gradients()

    def _grad_weight(self, dy: Tensor, x: Tensor | None, columns: slice, *, out: Tensor | None = None) -> Tensor:
        assert x is not None
        with without_autocast(dy.device):
            return self._product.grad_weight(dy, x, columns, out=out)

    def _room(self, like: Tensor, ranges: list[slice]) -> Tensor:
        """For the widest of the ranges, which take turns: fresh memory for each would cost its first touch."""
        width = max(columns.stop - columns.start for columns in ranges)
        return like.new_empty(self._num_out * width)

    def _part(self, room: Tensor, columns: slice) -> Tensor:
        width = columns.stop - columns.start
        return room[: self._num_out * width].view(self._num_out, width)

    def _merge(self, wanted: Wanted) -> "_Merge":
        if self._implementation == "triton":
            return _TritonMerge(self._delta, self._taus, self._logs, wanted)
        return TorchMerge(self._delta, self._taus, wanted, tile_columns=self._tile_columns)

    def _ranges(self, dtype: torch.dtype, *, num_buffers: int, is_narrow: bool) -> list[slice]:
        """As wide as half the limit allows (a tile's buffers have the other half), in whole tiles.

        is_narrow: on CPU no wider than a product needs to run at full speed. Triton has no tiles in memory, and a
        GPU wants its products whole: one range.
        """
        num_columns = self._delta.num_columns
        if self._implementation == "triton":
            return [slice(0, num_columns)]
        width = self._limit_bytes // 2 // (max(num_buffers, 1) * self._num_out * dtype.itemsize)
        if width < num_columns and dtype.itemsize < 4:
            width //= 3  # beside each number of 2 bytes stands its copy of 4
        if is_narrow and self._delta.A.device.type == "cpu" and isinstance(self._product, LinearProduct):
            width = min(width, max(_CPU_RANGE_COLUMNS, self._tile_columns))
        width = max(width // self._tile_columns, 1) * self._tile_columns
        starts = range(0, num_columns, width)
        return [slice(start, min(start + width, num_columns)) for start in starts]


class _Merge(Protocol):
    def visit(
        self, columns: slice, *, weight: Tensor | None, merged: Tensor | None, G: Tensor | None
    ) -> None: ...

    def gradients(self) -> list[Tensor | None]: ...


class _TritonMerge:
    """What TorchMerge is, by the fused kernels."""

    def __init__(self, delta: Delta, taus: Tensor | None, logs: Tensor | None, wanted: Wanted) -> None:
        self._delta, self._taus, self._logs = delta, taus, logs
        of_params = wanted.params or (False,) * len(delta.params)
        self._sums = FactorGradients.zeros(delta, (wanted.A, wanted.B, *of_params))

    def visit(self, columns: slice, *, weight: Tensor | None, merged: Tensor | None, G: Tensor | None) -> None:
        from . import triton_impl

        if merged is not None:
            dtype = merged.dtype
            weight = None if weight is None else weight.flatten(1)
            triton_impl.merge_columns(self._delta, self._taus, self._logs, weight, columns, dtype, out=merged)
        if G is not None:
            triton_impl.add_gradients(self._delta, self._taus, self._logs, G, columns, self._sums)

    def gradients(self) -> list[Tensor | None]:
        return [self._sums.A, self._sums.B, *self._sums.params]
