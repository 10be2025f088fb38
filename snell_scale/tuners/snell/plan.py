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
    drop_path: float
    init_weights: bool | InitWeights
    init_scale: float


def plan_layer(config: SnellConfig, name: str, module: nn.Module) -> LayerPlan:
    """The plan for the module of that name; raises ValueError where SNELL cannot adapt it as configured."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    _check_supported(name, base)
    out_features, in_features = matrix_shape(base)
    num_groups = next((count for end, count in config.fused_groups.items() if matches([end], name)), 1)
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
    without_dropout = config.dropout_exclude_modules and matches(config.dropout_exclude_modules, name)
    return LayerPlan(
        num_groups=num_groups,
        rank=rank,
        num_components=config.num_components,
        kernel=config.kernel,
        weighting=config.weighting,
        sparsity=config.start_sparsity,
        competes=config.competes,
        scale=scale,
        dropout=0.0 if without_dropout else config.dropout,
        drop_path=config.drop_path,
        init_weights=config.init_weights,
        init_scale=config.init_scale,
    )


def matrix_shape(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix, a convolution's being (out, in·kh·kw).

    From the module's attributes, for the weight itself may be sharded.
    """
    if isinstance(base, nn.Conv2d):
        return base.out_channels, base.in_channels * base.kernel_size[0] * base.kernel_size[1]
    assert isinstance(base, nn.Linear)
    return base.out_features, base.in_features


def matches(patterns: str | Iterable[str], name: str) -> bool:
    """PEFT's rule: a string is a regex for the whole name, a list holds whole names or their endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in patterns)


def _check_supported(name: str, base: nn.Module) -> None:
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    way_out = "narrow target_modules or put it into exclude_modules"
    if not isinstance(base, (nn.Linear, nn.Conv2d)):
        raise ValueError(f"{name} is a {kind}; SNELL adapts nn.Linear and nn.Conv2d: {way_out}")
    dtype = base.weight.dtype
    if resolve_quantization_backend(base) is not None or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"{name} ({kind}) has a quantized weight, which cannot take a sparse delta: {way_out}")
    if isinstance(base, nn.Conv2d):
        if base.groups != 1:
            raise ValueError(
                f"{name} is a convolution in {base.groups} groups, which SNELL does not adapt (its groups are "
                f"separate small matrices): {way_out}"
            )
        own = (type(base).forward, type(base)._conv_forward)
        if own != (nn.Conv2d.forward, nn.Conv2d._conv_forward):
            raise ValueError(
                f"{name} is a {kind}, a convolution with a forward of its own, which the delta could not "
                f"follow: {way_out}"
            )
