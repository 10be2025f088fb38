"""The op's public functions: they check what they are given, follow autocast, and call the autograd Function."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .autograd import MergeFunction, MergeOptions
from .numerics import factor_dtype
from .products import Conv2dProduct, LinearProduct, Product, WeightItself

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
    Gradients reach x, weight, A, B, bias and kernel_params, each only if it requires one; g and M carry none.
    Raises ValueError for shapes that do not fit, unknown names, missing parameters, sparsity out of range.
    Plain equivalent: `F.linear(x, weight + delta_weight_reference(A, B, ...), bias)`.
    """
    options, params = _checked(A, B, LinearProduct(), sparsity, kernel, weighting, scale, kernel_params)
    if weight is not None:
        if weight.dim() != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (out, in)")
        checks.check_weight(A, B, weight.shape, num_in=weight.shape[1])
    if x.dim() == 0 or x.shape[-1] != A.shape[-2]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., {A.shape[-2]}), the in of A")
    return _apply(options, x, weight, A, B, bias, params)


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
    product = Conv2dProduct(shape, stride=stride, padding=sides, dilation=dilation)
    options, params = _checked(A, B, product, sparsity, kernel, weighting, scale, kernel_params)
    checks.check_weight(A, B, shape, num_in=shape[1] * shape[2] * shape[3])
    batched = x_padded if x.dim() == 4 else x_padded.unsqueeze(0)
    y = _apply(options, batched, weight, A, B, bias, params)
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
) -> Tensor:
    """ΔW, (out, in), in the factors' dtype, at least float32; arguments and gradients as `merge_linear`."""
    options, params = _checked(A, B, WeightItself(), sparsity, kernel, weighting, scale, kernel_params)
    no_input = torch.empty(0, dtype=factor_dtype(A), device=A.device)
    return MergeFunction.apply(options, no_input, None, None, A, B, *params)


def _checked(
    A: Tensor,
    B: Tensor,
    product: Product,
    sparsity: Sparsity,
    kernel: str,
    weighting: str,
    scale: float,
    kernel_params: Mapping[str, Tensor] | None,
) -> tuple[MergeOptions, list[Tensor]]:
    checks.check_names(kernel, weighting)
    checks.check_factors(A, B)
    num_groups = A.shape[0] if A.dim() == 4 else 1
    params = checks.ordered_params(kernel, kernel_params, num_groups=num_groups)
    per_group = checks.sparsity_per_group(sparsity, num_groups=num_groups)
    return MergeOptions(kernel, weighting, float(scale), per_group, product), params


def _apply(
    options: MergeOptions,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    params: list[Tensor],
) -> Tensor:
    """Rounds x and bias as autocast would for F.linear, differentiably; the weight is handed on untouched."""
    num_groups = A.shape[0] if A.dim() == 4 else 1
    checks.check_bias(bias, num_out=num_groups * B.shape[-2])
    lower = _autocast_dtype(x)
    if lower is not None:
        x = x.to(lower)
        bias = None if bias is None else bias.to(lower)
    checks.check_dtypes(x, weight, bias, is_autocast=lower is not None)
    return MergeFunction.apply(options, x, weight, bias, A, B, *params)


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
