"""SNELL: sparse tuning with kernelized low-rank factors, as a PEFT method."""

from snell_scale.tuners.snell.attention import SnellMultiheadAttention
from snell_scale.tuners.snell.config import SnellConfig
from snell_scale.tuners.snell.conv import SnellConv2d
from snell_scale.tuners.snell.layer import SnellLayer
from snell_scale.tuners.snell.linear import SnellLinear
from snell_scale.tuners.snell.model import SnellModel

__all__ = ["SnellConfig", "SnellConv2d", "SnellLayer", "SnellLinear", "SnellModel", "SnellMultiheadAttention"]
