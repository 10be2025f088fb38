"""SNELL on nn.Conv2d: the kernel as a matrix of (out_channels, in_channels·kh·kw)."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from snell_scale.kernels.merge import merge_conv2d
from snell_scale.tuners.snell.product import SnellProductLayer

Padding = tuple[int, int] | str


class SnellConv2d(SnellProductLayer):
    """y = conv2d(x, W0 + ΔW) + b with the base's stride, dilation, padding and padding mode; groups = 1."""

    def _merged_product(self, x: Tensor, adapter_name: str) -> Tensor:
        base = self._base()
        x, padding = self._padded(x)
        return merge_conv2d(
            x,
            base.weight,
            self.snell_A[adapter_name],
            self.snell_B[adapter_name],
            base.bias,
            stride=_pair(base.stride),
            padding=padding,
            dilation=_pair(base.dilation),
            **self._product_arguments(adapter_name),
        )

    def _delta_product(self, x: Tensor, adapter_name: str) -> Tensor:
        base = self._base()
        x, padding = self._padded(x)
        return merge_conv2d(
            x,
            None,
            self.snell_A[adapter_name],
            self.snell_B[adapter_name],
            weight_shape=self._weight_shape(),
            stride=_pair(base.stride),
            padding=padding,
            dilation=_pair(base.dilation),
            **self._product_arguments(adapter_name),
        )

    def _padded(self, x: Tensor) -> tuple[Tensor, Padding]:
        """The input, padded here unless with zeros, and the padding that is left for the convolution."""
        base = self._base()
        if base.padding_mode == "zeros":
            return x, base.padding if isinstance(base.padding, str) else _pair(base.padding)
        return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), (0, 0)

    def _weight_shape(self) -> tuple[int, ...]:
        base = self._base()
        return base.out_channels, base.in_channels, *base.kernel_size

    def _is_batched(self, y: Tensor) -> bool:
        return y.dim() == 4

    def _base(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width
