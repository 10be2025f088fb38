"""From a SnellConfig and one module to that layer's adapter: its matrices, rank, kernel and settings."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn

from snell_scale.kernels.merge import auto_scale
from snell_scale.tuners.snell.config import InitWeights, Kernel, SnellConfig, Weighting

KERNEL_PARAMETERS: dict[Kernel, dict[str, float]] = {
    "distance": {},
    "mixk": {"alpha": 1.0, "gamma": 1.0, "beta": 0.0},
    "linear": {},
    # α and γ start so that K ≈ 0 where the factors are small.
    "sigmoid": {"alpha": 1.0, "gamma": -0.5, "beta": 1.0},
    "rbf": {"alpha": 1.0, "gamma": -1.0, "beta": 1.0},
    "exponential": {"alpha": 1.0, "gamma": -1.0, "beta": 1.0},
}
"""Trainable scalars of each kernel and their values at the start, one of each per matrix."""

OUT_PROJECTION = "out_proj"
"""What nn.MultiheadAttention calls its out projection, as dropout_exclude_modules can name it."""


@dataclass(frozen=True)
class LayerPlan:
    """One adapter of one layer: G stacked matrices of (out/G, in), each with factors of `rank` columns."""

    num_groups: int
    rank: int
    num_components: int
    kernel: Kernel
    weighting: Weighting
    sparsity: float | None
    competes: bool  # the sparsities change during training and are saved with the factors
    scale: float
    dropout: float
    out_dropout: float  # of the out projection of nn.MultiheadAttention, which dropout_exclude_modules can name
    drop_path: float
    init_weights: bool | InitWeights
    init_scale: float


def plan_layer(config: SnellConfig, name: str, module: nn.Module) -> LayerPlan:
    """The plan for the module of that name; raises ValueError where SNELL cannot adapt it as configured."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    _check_supported(name, base)
    out_features, in_features = matrix_shape(base)
    num_groups = 4 if isinstance(base, nn.MultiheadAttention) else _fused(config, name)
    if out_features % num_groups:
        raise ValueError(
            f"{name} has {out_features} output features, which fused_groups splits into {num_groups} matrices "
            f"of equal size: it cannot; correct fused_groups={config.fused_groups}"
        )
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    smallest = min(in_features, out_features // num_groups)
    if rank > smallest:
        raise ValueError(
            f"r={rank} is too large for {name}, whose matrices are {out_features // num_groups}×{in_features}: "
            f"lower r to at most {smallest} (rank_pattern does so for single modules) or put the module into "
            "exclude_modules"
        )
    scale = config.scale
    if scale == "auto":
        scale = auto_scale(in_features, out_features // num_groups, rank, config.num_components)
    return LayerPlan(
        num_groups=num_groups,
        rank=rank,
        num_components=config.num_components,
        kernel=config.kernel,
        weighting=config.weighting,
        sparsity=config.start_sparsity,
        competes=config.competes,
        scale=scale,
        dropout=_dropout(config, name),
        out_dropout=min(_dropout(config, name), _dropout(config, f"{name}.{OUT_PROJECTION}")),
        drop_path=config.drop_path,
        init_weights=config.init_weights,
        init_scale=config.init_scale,
    )


def matrix_shape(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix: of a convolution (out, in·kh·kw), of attention all four stacked.

    From the module's attributes, for the weight itself may be sharded.
    """
    if isinstance(base, nn.Conv2d):
        return base.out_channels, base.in_channels * base.kernel_size[0] * base.kernel_size[1]
    if isinstance(base, nn.MultiheadAttention):
        return 4 * base.embed_dim, base.embed_dim
    assert isinstance(base, nn.Linear)
    return base.out_features, base.in_features


def matches(patterns: str | Iterable[str], name: str) -> bool:
    """PEFT's rule: a string is a regex for the whole name, a list holds whole names or their endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in patterns)


def _fused(config: SnellConfig, name: str) -> int:
    return next((count for end, count in config.fused_groups.items() if matches([end], name)), 1)


def _dropout(config: SnellConfig, name: str) -> float:
    excluded = config.dropout_exclude_modules
    return 0.0 if excluded and matches(excluded, name) else config.dropout


def _check_supported(name: str, base: nn.Module) -> None:
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    problem = None
    if not isinstance(base, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
        problem = f"is a {kind}; SNELL adapts nn.Linear, nn.Conv2d and nn.MultiheadAttention"
    elif isinstance(base, nn.MultiheadAttention):
        problem = _problem_of_attention(base)
    elif isinstance(base, nn.Conv2d):
        problem = _problem_of_convolution(base)
    if problem is None and _is_quantized(base):
        problem = f"({kind}) has a quantized weight, which cannot take a sparse delta"
    if problem is not None:
        raise ValueError(f"{name} {problem}: narrow target_modules or put it into exclude_modules")


def _is_quantized(base: nn.Module) -> bool:
    weights = [p for name, p in base.named_parameters() if name.endswith("weight")]
    return resolve_quantization_backend(base) is not None or any(
        not weight.dtype.is_floating_point or weight.dtype.itemsize < 2 for weight in weights
    )


def _problem_of_attention(base: nn.MultiheadAttention) -> str | None:
    if type(base).forward is not nn.MultiheadAttention.forward:
        kind = type(base).__qualname__
        return f"is a {kind}, attention with a forward of its own, which the deltas could not follow"
    if not base._qkv_same_embed_dim:
        return (
            f"has kdim={base.kdim} and vdim={base.vdim} beside embed_dim={base.embed_dim}; SNELL adapts "
            "nn.MultiheadAttention whose q, k and v are matrices of one size"
        )
    if base.bias_k is not None or base.bias_v is not None or base.add_zero_attn:
        return "has add_bias_kv or add_zero_attn, which SNELL's attention does not compute"
    if isinstance(base.out_proj, BaseTunerLayer):
        return f"has an out_proj with an adapter of its own ({type(base.out_proj).__qualname__})"
    return None


def _problem_of_convolution(base: nn.Conv2d) -> str | None:
    if base.groups != 1:
        return (
            f"is a convolution in {base.groups} groups, which SNELL does not adapt (its groups are separate "
            "small matrices)"
        )
    own = (type(base).forward, type(base)._conv_forward)
    if own != (nn.Conv2d.forward, nn.Conv2d._conv_forward):
        kind = f"{type(base).__module__}.{type(base).__qualname__}"
        return f"is a {kind}, a convolution with a forward of its own, which the delta could not follow"
    return None
