"""SNELL on nn.Linear."""

from typing import cast

from torch import Tensor, nn

from snell_scale.kernels.merge import merge_linear
from snell_scale.tuners.snell.product import SnellProductLayer


class SnellLinear(SnellProductLayer):
    """y = x (W0 + ΔW)ᵀ + b, x of shape (…, in_features)."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the adapter is a delta on the weight, which peft's `convert_to_lora` approximates by an SVD."""
        return True

    def _merged_product(self, x: Tensor, adapter_name: str) -> Tensor:
        base, (A, B) = self._base(), self._factors(adapter_name)
        return merge_linear(x, base.weight, A, B, base.bias, **self._product_arguments(adapter_name))

    def _delta_product(self, x: Tensor, adapter_name: str) -> Tensor:
        A, B = self._factors(adapter_name)
        return merge_linear(x, None, A, B, **self._product_arguments(adapter_name))

    def _weight_shape(self) -> tuple[int, ...]:
        return self._base().out_features, self._base().in_features

    def _is_batched(self, y: Tensor) -> bool:
        return y.dim() > 1

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.snell_A[adapter_name], self.snell_B[adapter_name]

    def _base(self) -> nn.Linear:
        return cast(nn.Linear, self.get_base_layer())
