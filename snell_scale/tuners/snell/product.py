"""A SNELL layer whose base is one product: nn.Linear or nn.Conv2d, applied with W0 + ΔW at once."""

from abc import abstractmethod
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from snell_scale.tuners.snell.layer import SnellLayer


class SnellProductLayer(SnellLayer):
    """What linear and convolution share: one weight, and which product to take."""

    def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        """x: any shape the base layer takes. One product with the merged weight where the method allows it."""
        if adapter_names is not None:
            raise ValueError(
                "SNELL cannot mix adapters within a batch (adapter_names): run one batch per adapter, with "
                "set_adapter before it"
            )
        active = self._active_here()
        if not active:
            return self.base_layer(x)
        if len(active) == 1 and self._takes_one_product(active[0]):
            return self._merged_product(x, active[0])
        y = self.base_layer(x)
        for name in active:
            y = y + self._noisy_delta_product(x, name).to(y.dtype)
        return y

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW in the shape of the base weight, in the factors' dtype."""
        return super().get_delta_weight(adapter_name).view(self._weight_shape())

    @abstractmethod
    def _merged_product(self, x: Tensor, adapter_name: str) -> Tensor:
        """x (W0 + ΔW)ᵀ + b. The base weight goes in as the Parameter itself: sharding engines rely on it."""

    @abstractmethod
    def _delta_product(self, x: Tensor, adapter_name: str) -> Tensor:
        """x ΔWᵀ."""

    @abstractmethod
    def _weight_shape(self) -> tuple[int, ...]:
        """Shape of the base weight, from the module's attributes."""

    @abstractmethod
    def _is_batched(self, y: Tensor) -> bool:
        """Whether the output's first dimension counts samples."""

    def _base(self) -> nn.Linear | nn.Conv2d:
        return cast("nn.Linear | nn.Conv2d", self.get_base_layer())

    def _weights(self) -> tuple[Tensor, ...]:
        return (self._base().weight,)

    def _takes_one_product(self, adapter_name: str) -> bool:
        base = self._base()
        if self._is_noisy(adapter_name, self.snell_plan[adapter_name].dropout):
            return False
        # A base with a forward of its own (a subclass, or one replaced by an offloading hook) has to be called.
        plain = nn.Conv2d.forward if isinstance(base, nn.Conv2d) else nn.Linear.forward
        return type(base).forward is plain and "forward" not in vars(base)

    def _noisy_delta_product(self, x: Tensor, adapter_name: str) -> Tensor:
        dropout = self.snell_plan[adapter_name].dropout
        y = self._delta_product(F.dropout(x, dropout, self.training), adapter_name)
        return self._without_some_samples(y, adapter_name, is_batched=self._is_batched(y))
