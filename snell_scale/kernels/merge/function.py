"""The op's public functions: they check what they are given, follow autocast, and call the operators."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .choice import choose_implementation
from .delta import KERNEL_PARAMETERS
from .numerics import factor_dtype, without_autocast
from .operators import Call, merge_forward, merge_thresholds
from .reference import delta_weight_reference
from .walk import DEFAULT_TRANSIENT_LIMIT_BYTES

Sparsity = float | Sequence[float] | Tensor | None


def merge_linear(
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    sparsity: Sparsity,
    kernel: str = "distance",
    weighting: str = "magnitude",
    scale: float = 0.1,
    kernel_params: Mapping[str, Tensor] | None = None,
    threshold_memory: Tensor | None = None,
    implementation: str = "auto",
    transient_limit_bytes: int = DEFAULT_TRANSIENT_LIMIT_BYTES,
) -> Tensor:
    """y = x (W0 + ΔW)ᵀ + b, with ΔW = K(A, B) ⊙ g ⊙ M of SNELL (arXiv 2411.01800) or SNELLA (arXiv 2510.24037).

    x: (..., in), any leading dimensions. weight W0: (out, in) in x's dtype (any dtype under autocast), or None
    for the delta alone, y = x ΔWᵀ + b. bias: (out,). Returns (..., out) in x's dtype, or in autocast's.
    A: (G, H, in, r/H), B: (G, H, out/G, r/H): H components of G matrices stacked along out; 3-D means G = 1.
    K and ΔW are computed in their dtype, at least float32, and W0 + ΔW is rounded to x's dtype once.
    sparsity: the share of entries set to zero. None: dense, ΔW = K. A number in [0, 1), or one per group. A
    float64 tensor (G,) on any device is not checked and never read back from a device; at 1 nothing survives.
    kernel: distance | mixk | linear | sigmoid | rbf | exponential.
    weighting: g = |K| (magnitude) | |K| − τ (soft) | 1 (hard).
    scale: the c of K = c Σ_h (−1)^h d_h; it multiplies the distance part only, the other kernels do not read it.
    kernel_params: alpha, gamma, beta, each (G,), for mixk, sigmoid, rbf and exponential.
    threshold_memory: (G, 2) float32, NaN at first, overwritten by each call: where the next looks for τ first.
    It saves time and changes nothing else; a layer keeps one from step to step.
    implementation: auto (triton on CUDA, else torch) | reference (plain autograd) | torch | triton.
    transient_limit_bytes: bound of what a call holds for a while besides its results, whatever the layer's size.
    Gradients reach x, weight, A, B, bias and kernel_params, each only if it requires one; g and M carry none.
    Raises ValueError for shapes that do not fit, unknown names, missing parameters, sparsity out of range.
    Plain equivalent: `F.linear(x, weight + delta_weight_reference(A, B, ...), bias)`.
    """
    settings = _Settings(sparsity, kernel, weighting, scale, kernel_params, implementation, transient_limit_bytes)
    call, per_group = _checked(A, B, x, (), settings)
    if weight is not None:
        if weight.dim() != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (out, in)")
        checks.check_weight(A, B, weight.shape, num_in=weight.shape[1])
    if x.dim() == 0 or x.shape[-1] != A.shape[-2]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., {A.shape[-2]}), the in of A")
    return _product(call, x, weight, bias, per_group, threshold_memory)


def merge_conv2d(
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    weight_shape: Sequence[int] | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    sparsity: Sparsity,
    kernel: str = "distance",
    weighting: str = "magnitude",
    scale: float = 0.1,
    kernel_params: Mapping[str, Tensor] | None = None,
    threshold_memory: Tensor | None = None,
    implementation: str = "auto",
    transient_limit_bytes: int = DEFAULT_TRANSIENT_LIMIT_BYTES,
) -> Tensor:
    """y = conv2d(x, W0 + ΔW) + b; the weight (out, in, kh, kw) is seen as a matrix (out, in·kh·kw).

    x: (N, in, h, w) or (in, h, w). weight None (the delta alone) needs `weight_shape`. stride, padding, dilation
    as in F.conv2d, ungrouped. The rest as `merge_linear`, with A (G, H, in·kh·kw, r/H).
    """
    shape = tuple(weight_shape or ()) if weight is None else tuple(weight.shape)
    if len(shape) != 4:
        raise ValueError(
            f"the weight's shape is {shape}; expected (out, in, kh, kw): without weight give weight_shape"
        )
    if x.dim() not in (3, 4) or x.shape[-3] != shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (N, {shape[1]}, h, w) for the weight {shape}; a grouped "
            "convolution is not supported: leave that layer out of the target modules"
        )
    stride, dilation = _pair(stride), _pair(dilation)
    x_padded, sides = _resolve_padding(x, padding, window=shape[2:], dilation=dilation, stride=stride)
    geometry = (*shape[2:], *stride, *sides, *dilation)
    settings = _Settings(sparsity, kernel, weighting, scale, kernel_params, implementation, transient_limit_bytes)
    call, per_group = _checked(A, B, x, geometry, settings)
    checks.check_weight(A, B, shape, num_in=shape[1] * shape[2] * shape[3])
    batched = x_padded if x.dim() == 4 else x_padded.unsqueeze(0)
    y = _product(call, batched, weight, bias, per_group, threshold_memory)
    return y if x.dim() == 4 else y.squeeze(0)


def delta_weight(
    A: Tensor,
    B: Tensor,
    *,
    sparsity: Sparsity,
    kernel: str = "distance",
    weighting: str = "magnitude",
    scale: float = 0.1,
    kernel_params: Mapping[str, Tensor] | None = None,
    implementation: str = "auto",
    transient_limit_bytes: int = DEFAULT_TRANSIENT_LIMIT_BYTES,
) -> Tensor:
    """ΔW, (out, in), in the factors' dtype, at least float32; arguments and gradients as `merge_linear`.

    Not of the hot path: it looks at the factors, and raises ValueError if one is not finite.
    """
    settings = _Settings(sparsity, kernel, weighting, scale, kernel_params, implementation, transient_limit_bytes)
    call, per_group = _checked(A, B, None, (0,), settings)
    checks.check_finite(call.factors)
    no_input = torch.empty(0, A.shape[-2], dtype=factor_dtype(A), device=A.device)
    return _merged(call, no_input, None, None, per_group, None)


class _Settings(NamedTuple):
    """The keywords that the public functions share."""

    sparsity: Sparsity
    kernel: str
    weighting: str
    scale: float
    kernel_params: Mapping[str, Tensor] | None
    implementation: str
    transient_limit_bytes: int


def _checked(
    A: Tensor, B: Tensor, x: Tensor | None, geometry: tuple[int, ...], settings: _Settings
) -> tuple[Call, Tensor | None]:
    """The call, its tensors with a dimension for the groups; the sparsity as a tensor (G,), None when dense."""
    kernel, weighting = settings.kernel, settings.weighting
    checks.check_names(kernel, weighting, settings.implementation)
    checks.check_factors(A, B)
    checks.check_limit(settings.transient_limit_bytes)
    A, B = (factor if factor.dim() == 4 else factor.unsqueeze(0) for factor in (A, B))
    params = checks.named_params(kernel, settings.kernel_params, num_groups=A.shape[0])
    per_group = checks.sparsity_per_group(settings.sparsity, num_groups=A.shape[0])
    alpha, gamma, beta = (params.get(name) for name in ("alpha", "gamma", "beta"))
    chosen = choose_implementation(settings.implementation, A, None if x is None else x.dtype)
    scale, limit = float(settings.scale), settings.transient_limit_bytes
    call = Call(A, B, alpha, gamma, beta, geometry, kernel, weighting, scale, chosen, limit)
    return call, _on_device(per_group, A)


def _on_device(sparsity: tuple[float, ...] | Tensor | None, A: Tensor) -> Tensor | None:
    """(G,) float64. A number is filled in on the device: nothing is copied there and nothing waits."""
    if sparsity is None:
        return None
    if isinstance(sparsity, Tensor):
        # Off the device a copy that nobody waits for might be read too soon.
        return sparsity.to(A.device, non_blocking=A.device.type == "cuda")
    if len(set(sparsity)) == 1:
        return torch.full((len(sparsity),), sparsity[0], dtype=torch.float64, device=A.device)
    return torch.stack([torch.full((), each, dtype=torch.float64, device=A.device) for each in sparsity])


def _product(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sparsity: Tensor | None,
    memory: Tensor | None,
) -> Tensor:
    """Rounds x and bias as autocast would for F.linear, differentiably; the weight is handed on untouched."""
    checks.check_bias(bias, num_out=call.num_out)
    checks.check_memory(memory, call.A)
    lower = _autocast_dtype(x)
    if lower is not None:
        x = x.to(lower)
        bias = None if bias is None else bias.to(lower)
    checks.check_dtypes(x, weight, bias, is_autocast=lower is not None)
    return _merged(call, x, weight, bias, sparsity, memory)


def _merged(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sparsity: Tensor | None,
    memory: Tensor | None,
) -> Tensor:
    if call.implementation == "reference":
        return _by_reference(call, x, weight, bias, sparsity)
    without_history = (None if each is None else each.detach() for each in call[:5])
    taus, logs = merge_thresholds(sparsity, memory, *without_history, *call[5:])
    return merge_forward(
        x, weight, bias, None if sparsity is None else taus, logs if logs.dim() == 2 else None, *call
    )


def _by_reference(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, sparsity: Tensor | None
) -> Tensor:
    """The specification, with plain autograd: every (out, in) tensor is kept."""
    delta = call.delta(is_dense=sparsity is None)
    with without_autocast(x.device):
        merged = delta_weight_reference(
            delta.A,
            delta.B,
            sparsity=sparsity,
            kernel=call.kernel,
            weighting=call.weighting,
            scale=call.scale,
            kernel_params=dict(zip(KERNEL_PARAMETERS[call.kernel], delta.params, strict=True)),
        )
        if weight is not None:
            merged = merged + weight.flatten(1)
        return call.product.add_output(None, x, merged.to(x.dtype), slice(0, merged.shape[1]), bias)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would round x to; None when it is off, and for float64 and integers, which it leaves."""
    device_type = x.device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return None
    if not x.dtype.is_floating_point or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _resolve_padding(
    x: Tensor,
    padding: int | tuple[int, int] | str,
    *,
    window: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """x, padded where only one side of a dimension needs it, and the padding left to the convolution."""
    if not isinstance(padding, str):
        return x, _pair(padding)
    if padding == "valid":
        return x, (0, 0)
    if padding != "same" or stride != (1, 1):
        raise ValueError(
            f"padding is {padding!r} with stride {stride}; expected a number, a pair, 'valid', or 'same' with "
            "stride 1: give the padding as a number"
        )
    missing = [step * (size - 1) for step, size in zip(dilation, window, strict=True)]
    if any(total % 2 for total in missing):
        x = F.pad(x, (0, missing[1] % 2, 0, missing[0] % 2))
    return x, (missing[0] // 2, missing[1] // 2)
