"""The op's autograd Function: explicit forward and backward, with no (out, in) tensor kept between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_values import KERNELS, Matrix
from .numerics import factor_dtype, ieee_float32_products, without_autocast
from .products import Product
from .threshold import magnitude_threshold


@dataclass(frozen=True)
class MergeOptions:
    """Everything about a merge that is not differentiated; `sparsity` has one entry per group, None is dense."""

    kernel: str
    weighting: str
    scale: float
    sparsity: tuple[float, ...] | Tensor | None
    product: Product


class MergeFunction(torch.autograd.Function):
    """y = product(x, W0 + ΔW) + bias; weight None means ΔW alone. Arguments are trusted: function.py checks them.

    Between forward and backward live x, the very tensors W0, A, B and the kernel parameters, and one threshold
    per group; of these only what the gradients asked for will need. Backward computes K again by the same
    operations on the same numbers, so that the mask comes out the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: MergeOptions,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        *params: Tensor,
    ) -> Tensor:
        asked = ctx.asked = _Asked.read(options, ctx.needs_input_grad)
        with without_autocast(x.device):
            merged, taus = _merge(options, _matrices(options, A, B, params), weight, x.dtype)
            y = options.product.forward(x, merged, bias)
        ctx.options, ctx.x_shape = options, x.shape
        if asked.dx or asked.dweight or asked.factors:
            x_for_G = x if asked.dweight or asked.factors else None
            weight_to_merge = weight if asked.dx or asked.dweight else None
            ctx.save_for_backward(x_for_G, weight_to_merge, A, B, taus, *params)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not dy.requires_grad:
            # once_differentiable raises only for a dy that has a history; x, A and B have one all the same.
            dy = dy.detach().requires_grad_()
        return _first_derivative(ctx, dy)


@once_differentiable
def _first_derivative(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    options: MergeOptions = ctx.options
    asked: _Asked = ctx.asked
    dx = dweight = dbias = None
    dfactors: Sequence[Tensor | None] = (None,) * len(_factor_names(options))
    with without_autocast(dy.device):
        if asked.dbias:
            dbias = options.product.grad_bias(dy)
        if asked.dx or asked.dweight or asked.factors:
            merged, dweight, dfactors = _merge_backward(options, asked, ctx.saved_tensors, dy)
            dx = None if merged is None else options.product.grad_input(dy, merged, ctx.x_shape)
    return None, dx, dweight, dbias, *dfactors


class _Asked(NamedTuple):
    """The gradients that somebody will look at; `factors` names those of A, B and the kernel parameters."""

    dx: bool
    dweight: bool
    dbias: bool
    factors: frozenset[str]

    @classmethod
    def read(cls, options: MergeOptions, needs_input_grad: Sequence[bool]) -> "_Asked":
        _, dx, dweight, dbias, *factors = needs_input_grad
        named = zip(_factor_names(options), factors, strict=True)
        return cls(dx, dweight, dbias, frozenset(name for name, is_needed in named if is_needed))


def _merge(
    options: MergeOptions, matrices: list[Matrix], weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The merged weight (out, in) in `dtype`, and the thresholds (G,), None when dense."""
    merged = _MergedWeight(weight, dtype, len(matrices))
    taus = []
    for group, matrix in enumerate(matrices):
        sparsity = None if options.sparsity is None else options.sparsity[group]
        taus.append(_merge_group(options, matrix, sparsity, merged))
    return merged.whole(), torch.stack(taus) if options.sparsity is not None else None


def _merge_group(
    options: MergeOptions, matrix: Matrix, sparsity: float | Tensor | None, merged: "_MergedWeight"
) -> Tensor | None:
    """Appends this group's rows to `merged`; returns its τ."""
    with ieee_float32_products():
        K, _ = KERNELS[options.kernel].values(matrix, False)
    if sparsity is None:
        merged.append(K)
        return None
    magnitudes = K.abs()
    tau = magnitude_threshold(magnitudes, sparsity)
    K.mul_(_gate(magnitudes, tau, options.weighting))
    del magnitudes
    merged.append(K)
    return tau


def _merge_backward(
    options: MergeOptions, asked: _Asked, saved: Sequence[Any], dy: Tensor
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """The merged weight if dx needs it, dweight, and the gradients of A, B and the kernel parameters."""
    x, weight, A, B, taus, *params = saved
    matrices = _matrices(options, A, B, params)
    num_rows = matrices[0].B.shape[1]
    G_of_all = options.product.grad_weight(dy, x, slice(0, len(matrices) * num_rows)) if asked.dweight else None

    def read_G(group: int) -> Tensor:
        rows = slice(group * num_rows, (group + 1) * num_rows)
        return options.product.grad_weight(dy, x, rows) if G_of_all is None else G_of_all[rows].clone()

    merged = _MergedWeight(weight, dy.dtype, len(matrices)) if asked.dx else None
    gradients: list[dict[str, Tensor]] = []
    for group, matrix in enumerate(matrices) if asked.dx or asked.factors else ():
        tau = None if taus is None else taus[group]
        gradients.append(_group_backward(options, asked.factors, matrix, tau, merged, partial(read_G, group)))
    dfactors = [
        torch.stack([each[name] for each in gradients]).to(factor.dtype).view(factor.shape)
        if name in asked.factors
        else None
        for name, factor in zip(_factor_names(options), (A, B, *params), strict=True)
    ]
    dweight = None if G_of_all is None else G_of_all.to(weight.dtype).view(weight.shape)
    return None if merged is None else merged.whole(), dweight, dfactors


def _group_backward(
    options: MergeOptions,
    wanted: frozenset[str],
    matrix: Matrix,
    tau: Tensor | None,
    merged: "_MergedWeight | None",
    read_G: Callable[[], Tensor],
) -> dict[str, Tensor]:
    """Appends this group's rows to `merged`; returns the gradients wanted. G is read as late as possible."""
    with ieee_float32_products():
        K, state = KERNELS[options.kernel].values(matrix, bool(wanted))
    gate = None if tau is None else _gate(K.abs(), tau, options.weighting)
    if merged is not None:
        merged.append(K if gate is None else K.mul_(gate))
    del K
    if not wanted:
        return {}
    dK = read_G().to(matrix.A.dtype)
    if gate is not None:
        dK.mul_(gate)
    del gate
    with ieee_float32_products():
        return KERNELS[options.kernel].gradients(matrix, state, dK, wanted)


class _MergedWeight:
    """W0 + ΔW, (out, in), put together group by group and rounded once, to `dtype`."""

    def __init__(self, weight: Tensor | None, dtype: torch.dtype, num_groups: int) -> None:
        self._weight = None if weight is None else weight.flatten(1)
        self._dtype = dtype
        self._num_groups = num_groups
        self._num_rows = 0
        self._whole: Tensor | None = None

    def append(self, delta: Tensor) -> None:
        """The next group's ΔW, which may be overwritten. A single group becomes the whole without a copy."""
        start, self._num_rows = self._num_rows, self._num_rows + delta.shape[0]
        if self._weight is not None:
            base = self._weight[start : self._num_rows]
            delta = delta.to(torch.promote_types(base.dtype, delta.dtype)).add_(base)
        if self._num_groups == 1:
            self._whole = delta.to(self._dtype)
            return
        if self._whole is None:
            self._whole = delta.new_empty((self._num_groups * delta.shape[0], delta.shape[1]), dtype=self._dtype)
        self._whole[start : self._num_rows].copy_(delta)

    def whole(self) -> Tensor:
        assert self._whole is not None
        return self._whole


def _gate(magnitudes: Tensor, tau: Tensor, weighting: str) -> Tensor:
    """g ⊙ M, written into `magnitudes` where g is not 1."""
    survives = magnitudes > tau
    if weighting == "hard":
        return survives
    if weighting == "soft":
        magnitudes.sub_(tau)
    return magnitudes.mul_(survives)


def _factor_names(options: MergeOptions) -> tuple[str, ...]:
    return ("A", "B", *KERNELS[options.kernel].parameters)


def _matrices(options: MergeOptions, A: Tensor, B: Tensor, params: Sequence[Tensor]) -> list[Matrix]:
    """One per group, in the dtype of K."""
    dtype = factor_dtype(A)
    A, B = (factor.to(dtype).view(-1, *factor.shape[-3:]) for factor in (A, B))
    named = zip(KERNELS[options.kernel].parameters, (param.to(dtype).view(-1) for param in params), strict=True)
    by_name = dict(named)
    return [
        Matrix(A[group], B[group], {name: values[group] for name, values in by_name.items()}, options.scale)
        for group in range(A.shape[0])
    ]
