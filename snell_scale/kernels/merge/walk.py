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
# On CPU a product with this many columns runs at full speed, and less is live than with more.
_CPU_RANGE_COLUMNS, _CPU_RANGE_ENTRIES = 512, 3 << 18


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
        weight = None if weight is None else weight.flatten(1)
        ranges = self._ranges(x.dtype, num_buffers=1)
        # Partial sums over several ranges are added in float32 at least, and rounded once.
        operands = x.dtype if len(ranges) == 1 else torch.promote_types(x.dtype, torch.float32)
        y, bias = None, None if bias is None else bias.to(operands)
        with without_autocast(x.device):
            merge = self._merge(Wanted())
            for columns in ranges:
                merged = x.new_empty(self._num_out, columns.stop - columns.start)
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
        weight = None if weight is None else weight.flatten(1)
        dx = self._product.empty_grad_input(dy, x_shape) if wants_dx else None
        whole_G = self._grad_weight(dy, x, slice(0, self._delta.num_columns)) if wants_dweight else None
        with without_autocast(dy.device):
            merge = self._merge(wanted)
            for columns in self._ranges(dy.dtype, num_buffers=wants_dx + wanted.anything):
                G = None
                if wanted.anything:
                    G = self._grad_weight(dy, x, columns) if whole_G is None else whole_G[:, columns]
                merged = dy.new_empty(self._num_out, columns.stop - columns.start) if dx is not None else None
                with ieee_float32_products():
                    merge.visit(columns, weight=weight, merged=merged, G=G)
                del G
                if dx is not None and merged is not None:
                    self._product.write_grad_input(dx, dy, merged, columns)
            return dx, whole_G, merge.gradients()

    def _grad_weight(self, dy: Tensor, x: Tensor | None, columns: slice) -> Tensor:
        assert x is not None
        with without_autocast(dy.device):
            return self._product.grad_weight(dy, x, columns)

    def _merge(self, wanted: Wanted) -> "_Merge":
        if self._implementation == "triton":
            return _TritonMerge(self._delta, self._taus, self._logs, wanted)
        return TorchMerge(self._delta, self._taus, wanted, tile_columns=self._tile_columns)

    def _ranges(self, dtype: torch.dtype, *, num_buffers: int) -> list[slice]:
        """As wide as half the limit allows (a tile's buffers have the other half), in whole tiles.

        Triton has no tiles in memory, and a GPU wants its products whole: one range.
        """
        num_columns = self._delta.num_columns
        if self._implementation == "triton":
            return [slice(0, num_columns)]
        bytes_per_column = max(num_buffers, 1) * self._num_out * dtype.itemsize
        width = self._limit_bytes // 2 // bytes_per_column
        sums_in_place = dtype == torch.promote_types(dtype, torch.float32)
        if width < num_columns and not sums_in_place:
            width //= 3  # beside each number of 2 bytes stands its copy of 4
        if self._delta.A.device.type == "cpu" and isinstance(self._product, LinearProduct) and sums_in_place:
            width = min(width, max(_CPU_RANGE_COLUMNS, _CPU_RANGE_ENTRIES // self._num_out))
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
        self._sums = FactorGradients.zeros(delta, (wanted.A, wanted.B, *wanted.params))

    def visit(self, columns: slice, *, weight: Tensor | None, merged: Tensor | None, G: Tensor | None) -> None:
        from . import triton_impl

        if merged is not None:
            whole = triton_impl.merge_columns(self._delta, self._taus, self._logs, weight, columns, merged.dtype)
            merged.copy_(whole)
        if G is not None:
            triton_impl.add_gradients(self._delta, self._taus, self._logs, G, columns, self._sums)

    def gradients(self) -> list[Tensor | None]:
        return [self._sums.A, self._sums.B, *self._sums.params]
