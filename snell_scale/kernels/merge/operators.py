"""The op as operators registered with torch: opaque to torch.compile, with shapes for fake tensors, and autograd.

`merge_thresholds` finds τ, and autograd does not see it; `merge_forward` is the product with the merged weight.
Backward needs x and references to W0, A, B and the kernel's parameters, and one threshold per matrix; of these
only what the gradients asked for will use is kept. Arguments are trusted: function.py checks them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .choice import say_once
from .delta import KERNEL_PARAMETERS, Delta, Wanted
from .numerics import factor_dtype
from .products import Product, product_of
from .walk import Walk, thresholds

# The fields of Call, which ends the arguments of every operator.
_CALL = (
    "Tensor A, Tensor B, Tensor? alpha, Tensor? gamma, Tensor? beta, int[] geometry, str kernel, str weighting, "
    "float scale, str implementation, int transient_limit_bytes"
)
_DIFFERENTIABLE: tuple[str, ...] = ("x", "weight", "bias", "A", "B", "alpha", "gamma", "beta")


class Call(NamedTuple):
    """What all operators are told, in the order of the schemas.

    A (G, H, in, q), B (G, H, out/G, q), parameters (G,), None where the kernel has none. geometry: the product,
    see products.product_of. implementation: torch or triton.
    """

    A: Tensor
    B: Tensor
    alpha: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    geometry: Sequence[int]
    kernel: str
    weighting: str
    scale: float
    implementation: str
    transient_limit_bytes: int

    @property
    def product(self) -> Product:
        return product_of(self.geometry)

    @property
    def factors(self) -> list[Tensor]:
        """A, B and the kernel's parameters."""
        return [self.A, self.B, *(getattr(self, name) for name in KERNEL_PARAMETERS[self.kernel])]

    @property
    def num_out(self) -> int:
        return self.A.shape[0] * self.B.shape[2]

    def delta(self, *, is_dense: bool) -> Delta:
        """In the dtype of K, contiguous."""
        dtype = factor_dtype(self.A)
        A, B, *params = (each.to(dtype).contiguous() for each in self.factors)
        step = self.geometry[0] * self.geometry[1] if len(self.geometry) > 1 else 1
        return Delta(A, B, params, self.kernel, self.weighting, self.scale, is_dense, column_step=step)

    def walk(self, taus: Tensor | None, logs: Tensor | None) -> Walk:
        return Walk(
            self.delta(is_dense=taus is None),
            taus,
            logs,
            product=self.product,
            implementation=self.implementation,
            transient_limit_bytes=self.transient_limit_bytes,
        )


def _thresholds_body(sparsity: Tensor | None, memory: Tensor | None, *call: Any) -> tuple[Tensor, Tensor]:
    """τ (G,) and, for mixk under Triton, the logarithms of its column sums (G, in); empty where there is none."""
    asked = Call(*call)
    say_once(asked.implementation, asked.A.device.type, asked.A.dtype)
    delta = asked.delta(is_dense=sparsity is None)
    taus, logs = thresholds(
        delta,
        sparsity,
        memory,
        implementation=asked.implementation,
        transient_limit_bytes=asked.transient_limit_bytes,
    )
    none = delta.A.new_empty(0)
    return none if taus is None else taus, none.clone() if logs is None else logs


def _thresholds_shapes(sparsity: Tensor | None, memory: Tensor | None, *call: Any) -> tuple[Tensor, Tensor]:
    asked = Call(*call)
    num_groups, _, num_columns, _ = asked.A.shape
    dtype = factor_dtype(asked.A)
    taus = asked.A.new_empty(0 if sparsity is None else num_groups, dtype=dtype)
    has_logs = asked.kernel == "mixk" and asked.implementation == "triton"
    return taus, asked.A.new_empty((num_groups, num_columns) if has_logs else 0, dtype=dtype)


def _forward_body(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, taus: Tensor | None, logs: Tensor | None, *call: Any
) -> Tensor:
    """y = product(x, W0 + ΔW) + bias; weight None means ΔW alone. In x's dtype."""
    return Call(*call).walk(taus, logs).forward(x, weight, bias)


def _forward_shape(x: Tensor, weight: Any, bias: Tensor | None, taus: Any, logs: Any, *call: Any) -> Tensor:
    asked = Call(*call)
    num_columns = asked.A.shape[2]
    merged = x.new_empty(asked.num_out, num_columns)
    return asked.product.add_output(None, x, merged, slice(0, num_columns), bias)


def _backward_body(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    taus: Tensor | None,
    logs: Tensor | None,
    x_shape: Sequence[int],
    wanted: Sequence[bool],
    *call: Any,
) -> list[Tensor]:
    """The gradients of x, weight, bias, A, B, alpha, gamma, beta that are `wanted`, in this order, no others."""
    asked = Call(*call)
    wants = _by_name(wanted)
    of_factors = [wants[name] for name in ("A", "B", *KERNEL_PARAMETERS[asked.kernel])]
    gradients: dict[str, Tensor] = {}
    if wants["bias"]:
        gradients["bias"] = asked.product.grad_bias(dy)
    if wants["x"] or wants["weight"] or any(of_factors):
        dx, dweight, dfactors = asked.walk(taus, logs).backward(
            dy,
            x,
            weight,
            x_shape=x_shape,
            wants_dx=wants["x"],
            wants_dweight=wants["weight"],
            wanted=Wanted(of_factors[0], of_factors[1], tuple(of_factors[2:])),
        )
        found = zip(("x", "A", "B", *KERNEL_PARAMETERS[asked.kernel]), (dx, *dfactors), strict=True)
        gradients |= {name: gradient for name, gradient in found if gradient is not None}
        if dweight is not None and weight is not None:
            gradients["weight"] = dweight.to(weight.dtype).view(weight.shape)
    for name in ("A", "B", *KERNEL_PARAMETERS[asked.kernel]):
        if name in gradients:
            gradients[name] = gradients[name].to(getattr(asked, name).dtype).contiguous()
    return [gradients[name] for name in _DIFFERENTIABLE if wants[name]]


def _backward_shapes(
    dy: Tensor,
    x: Any,
    weight: Tensor | None,
    taus: Any,
    logs: Any,
    x_shape: Sequence[int],
    wanted: Sequence[bool],
    *call: Any,
) -> list[Tensor]:
    asked = Call(*call)
    wants = _by_name(wanted)
    gradients = []
    if wants["x"]:
        gradients.append(asked.product.empty_grad_input(dy, x_shape))
    if wants["weight"] and weight is not None:
        gradients.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
    if wants["bias"]:
        gradients.append(dy.new_empty(asked.num_out))
    factors = zip(("A", "B", *KERNEL_PARAMETERS[asked.kernel]), asked.factors, strict=True)
    return gradients + [torch.empty_like(factor) for name, factor in factors if wants[name]]


def _by_name(wanted: Sequence[bool]) -> dict[str, bool]:
    return dict(zip(_DIFFERENTIABLE, wanted, strict=True))


class _MergeFunction(torch.autograd.Function):
    """merge_forward with merge_backward as its derivative; what is saved is the inputs themselves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, taus: Any, logs: Any, *call: Any
    ) -> Tensor:
        needed = ctx.needs_input_grad
        ctx.wanted = [*needed[:3], *needed[5:10]]  # without taus and logs
        ctx.x_shape, ctx.settings = x.shape, call[5:]
        wants_dx, wants_dweight, _, *wants_factors = ctx.wanted
        wants_G = wants_dweight or any(wants_factors)
        if wants_dx or wants_G:
            weight_if_needed = weight if wants_dx or wants_dweight else None
            ctx.save_for_backward(x if wants_G else None, weight_if_needed, taus, logs, *call[:5])
        # Below views too: a view made in here could not be changed in place, as ReLU(inplace=True) would.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return merge_forward(x, weight, bias, taus, logs, *call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once only: activation checkpointing unpacks it then
        num_settings = len(ctx.settings)
        if not saved:
            dbias = product_of(ctx.settings[0]).grad_bias(dy)
            return None, None, dbias, *(None,) * (7 + num_settings)
        x, weight, taus, logs, *factors = saved
        found = merge_backward(dy, x, weight, taus, logs, ctx.x_shape, ctx.wanted, *factors, *ctx.settings)
        gradients = iter(found)
        in_order = [next(gradients) if is_wanted else None for is_wanted in ctx.wanted]
        return *in_order[:3], None, None, *in_order[3:], *(None,) * num_settings


class _MergeBackwardFunction(torch.autograd.Function):
    """merge_backward inside a graph that is being recorded: it has no derivative, and says so."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(merge_backward(*arguments))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "the merge op has no second derivative: its backward is written out and differentiable once. Leave "
            "out create_graph, or use implementation='reference'"
        )


# Defined by hand rather than with torch.library.custom_op, whose wrapper costs 50 to 100 µs a call on the host.
_LIBRARY = torch.library.Library("snell_scale", "DEF")
_LIBRARY.define(f"merge_thresholds(Tensor? sparsity, Tensor(a!)? memory, {_CALL}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"merge_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? taus, Tensor? logs, {_CALL}) -> Tensor"
)
_LIBRARY.define(
    "merge_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? taus, Tensor? logs, SymInt[] x_shape, "
    f"bool[] wanted, {_CALL}) -> Tensor[]"
)
merge_thresholds = torch.ops.snell_scale.merge_thresholds.default
merge_forward = torch.ops.snell_scale.merge_forward.default
merge_backward = torch.ops.snell_scale.merge_backward.default

# Also for tools that watch single torch operations (memory, FLOPs): what an operator runs, to call in its place.
PYTHON_BODIES: dict[Any, Callable[..., Any]] = {
    merge_thresholds: _thresholds_body,
    merge_forward: _forward_body,
    merge_backward: _backward_body,
}
for _operator, _body in PYTHON_BODIES.items():
    _LIBRARY.impl(_operator, _body, "CompositeExplicitAutograd")
torch.library.register_fake(merge_thresholds, _thresholds_shapes, lib=_LIBRARY)
torch.library.register_fake(merge_forward, _forward_shape, lib=_LIBRARY)
torch.library.register_fake(merge_backward, _backward_shapes, lib=_LIBRARY)
_LIBRARY.impl(merge_forward, _MergeFunction.apply, "Autograd")
_LIBRARY.impl(merge_backward, lambda *arguments: list(_MergeBackwardFunction.apply(*arguments)), "Autograd")
