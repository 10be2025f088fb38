"""One op: the product with a frozen weight plus its sparsified kernelised delta, `x (W0 + ΔW)ᵀ + b`."""

from .function import delta_weight, merge_conv2d, merge_linear
from .operators import PYTHON_BODIES
from .scale import auto_scale

__all__ = ["PYTHON_BODIES", "auto_scale", "delta_weight", "merge_conv2d", "merge_linear"]
