"""A SNELL layer: wraps an nn.Linear or nn.Conv2d and applies W0 + ΔW as one product (arXiv 2411.01800).

For G stacked matrices and H distance components, `snell_A[adapter]` has shape (G, H, in, r/H), `snell_B[adapter]`
(G, H, out/G, r/H), and `snell_alpha`, `snell_gamma`, `snell_beta` (G,) where the kernel has them; all are float32
(float64 under a float64 base), for distances are differences of close numbers. `snell_sparsity` (G,) float64
exists where matrices compete for the non-zeros.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from snell_scale.kernels.merge import delta_weight
from snell_scale.tuners.snell.plan import KERNEL_PARAMETERS, LayerPlan, matrix_shape


class MergeArguments(TypedDict):
    """What the merge op needs to know besides tensors."""

    sparsity: float | Tensor | None
    kernel: str
    weighting: str
    scale: float
    kernel_params: dict[str, Tensor] | None


class ProductArguments(MergeArguments):
    """What a product with the merged weight needs besides."""

    threshold_memory: Tensor | None


class FixedTypeBuffers(BufferDict):
    """Buffers by adapter name; `.to`, `.half` and the like change their device only.

    A sparsity rounded to bf16 would move thousands of entries.
    """

    def __init__(self, *, persistent: bool) -> None:
        super().__init__(persistent=persistent)

    def __getitem__(self, key: str) -> Tensor:
        value = self._buffers[key]
        assert value is not None
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedTypeBuffers":
        for key in self.keys():
            value, moved = self[key], fn(self[key])
            self._buffers[key] = moved if moved.dtype == value.dtype else value.to(moved.device)
        return self


class SnellLayer(nn.Module, BaseTunerLayer):
    """What linear and convolution share: parameters, merging into the base weight, and which product to take."""

    adapter_layer_names: tuple[str, ...] = ("snell_A", "snell_B", "snell_alpha", "snell_gamma", "snell_beta")
    other_param_names: tuple[str, ...] = ("snell_plan", "snell_sparsity", "snell_threshold_memory")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, plan: LayerPlan, *, inference_mode: bool
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.snell_A = nn.ParameterDict()
        self.snell_B = nn.ParameterDict()
        self.snell_alpha = nn.ParameterDict()
        self.snell_gamma = nn.ParameterDict()
        self.snell_beta = nn.ParameterDict()
        self.snell_sparsity = FixedTypeBuffers(persistent=True)
        self.snell_plan: dict[str, LayerPlan] = {}
        # Where the next threshold is looked for first: no state of the model, results do not depend on it.
        self.snell_threshold_memory = FixedTypeBuffers(persistent=False)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, plan, inference_mode=inference_mode)

    def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        """x: any shape the base layer takes. One product with the merged weight where the method allows it."""
        if adapter_names is not None:
            raise ValueError(
                "SNELL cannot mix adapters within a batch (adapter_names): run one batch per adapter, with "
                "set_adapter before it"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.snell_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x)
        if len(active) == 1 and self._takes_one_product(self.snell_plan[active[0]]):
            return self._merged_product(x, active[0])
        y = self.base_layer(x)
        for name in active:
            y = y + self._noisy_delta_product(x, name).to(y.dtype)
        return y

    def update_layer(self, adapter_name: str, plan: LayerPlan, *, inference_mode: bool) -> None:
        """Give the layer one more adapter, its parameters fresh."""
        base = self._base()
        out_features, in_features = matrix_shape(base)
        groups, components, columns = plan.num_groups, plan.num_components, plan.rank // plan.num_components
        self.snell_plan[adapter_name] = plan
        shapes = {"A": (groups, components, in_features, columns)}
        shapes["B"] = (groups, components, out_features // groups, columns)
        start = KERNEL_PARAMETERS[plan.kernel]
        device = torch.device("meta") if base.weight.device.type == "meta" else None
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        for factor, shape in shapes.items():
            container: nn.ParameterDict = getattr(self, f"snell_{factor}")
            container[adapter_name] = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            _init_factor(container[adapter_name], plan)
        for name, value in start.items():
            values = torch.full((groups,), value, device=device, dtype=dtype)
            getattr(self, f"snell_{name}")[adapter_name] = nn.Parameter(values)
        if plan.sparsity is not None:
            with torch.inference_mode(False):  # or no step outside of it could write there
                self.snell_threshold_memory[adapter_name] = torch.full(
                    (groups, 2), math.nan, device=device, dtype=torch.float32
                )
        if plan.competes:
            assert plan.sparsity is not None
            self.snell_sparsity[adapter_name] = torch.full(
                (groups,), plan.sparsity, device=device, dtype=torch.float64
            )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW in the shape of the base weight, in the factors' dtype."""
        delta = delta_weight(
            self.snell_A[adapter_name], self.snell_B[adapter_name], **self._merge_arguments(adapter_name)
        )
        return delta.view(self._weight_shape())

    def matrix_size(self, adapter_name: str) -> int:
        """Entries of one of the layer's stacked matrices."""
        out_features, in_features = matrix_shape(self.get_base_layer())
        return out_features * in_features // self.snell_plan[adapter_name].num_groups

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given (default: active) adapters to the base weight, rounding once.

        With `safe_merge` a result that is not finite raises ValueError and the weight stays as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.snell_A:
                continue
            merged = self._base_weight_plus(name, sign=1)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._base().weight.data.copy_(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged deltas out of the base weight again, exact up to rounding in its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.snell_A:
                self._base().weight.data.copy_(self._base_weight_plus(name, sign=-1))

    def cast_factors_as_base(self, adapter_name: str) -> None:
        """Give an adapter's factors and kernel scalars the base weight's dtype."""
        dtype = self._base().weight.dtype
        for container in self._parameters_of_adapters():
            if adapter_name in container:
                parameter = container[adapter_name]
                container[adapter_name] = nn.Parameter(parameter.data.to(dtype), parameter.requires_grad)

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

    def _takes_one_product(self, plan: LayerPlan) -> bool:
        base = self._base()
        if self.training and (plan.dropout > 0 or plan.drop_path > 0):
            return False
        # A base with a forward of its own (a subclass, or one replaced by an offloading hook) has to be called.
        plain = nn.Conv2d.forward if isinstance(base, nn.Conv2d) else nn.Linear.forward
        return type(base).forward is plain and "forward" not in vars(base)

    def _noisy_delta_product(self, x: Tensor, adapter_name: str) -> Tensor:
        plan = self.snell_plan[adapter_name]
        y = self._delta_product(F.dropout(x, plan.dropout, self.training), adapter_name)
        if not self.training or plan.drop_path == 0:
            return y
        keep = 1 - plan.drop_path
        shape = (y.shape[0], *(1 for _ in y.shape[1:])) if self._is_batched(y) else (1,) * y.dim()
        return y * y.new_empty(shape).bernoulli_(keep).div_(keep)

    def _product_arguments(self, adapter_name: str) -> ProductArguments:
        return {**self._merge_arguments(adapter_name), "threshold_memory": self._threshold_memory(adapter_name)}

    def _threshold_memory(self, adapter_name: str) -> Tensor | None:
        """(G, 2) beside the factors; None where nothing is remembered: dense, or tensors without values."""
        A = self.snell_A[adapter_name]
        if adapter_name not in self.snell_threshold_memory or A.is_meta or isinstance(A, FakeTensor):
            return None
        return self.snell_threshold_memory[adapter_name]

    def _merge_arguments(self, adapter_name: str) -> MergeArguments:
        plan = self.snell_plan[adapter_name]
        scalars = {name: getattr(self, f"snell_{name}")[adapter_name] for name in KERNEL_PARAMETERS[plan.kernel]}
        return {
            "sparsity": self.snell_sparsity[adapter_name] if plan.competes else plan.sparsity,
            "kernel": plan.kernel,
            "weighting": plan.weighting,
            "scale": plan.scale,
            "kernel_params": scalars or None,
        }

    @torch.no_grad()
    def _base_weight_plus(self, adapter_name: str, *, sign: int) -> Tensor:
        weight, delta = self._base().weight, self.get_delta_weight(adapter_name)
        return (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + sign * delta).to(weight.dtype)

    def _parameters_of_adapters(self) -> list[nn.ParameterDict]:
        return [getattr(self, name) for name in self.adapter_layer_names]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT's hook, also called after loading. PEFT would cast to the base's dtype; factors keep theirs."""
        target = device or self._base().weight.device
        if target.type == "meta":
            return
        for container in self._parameters_of_adapters():
            if adapter_name in container and container[adapter_name].device.type != "meta":
                parameter = container[adapter_name]
                if parameter.device != target:
                    container[adapter_name] = nn.Parameter(parameter.data.to(target), parameter.requires_grad)
        for buffers in (self.snell_sparsity, self.snell_threshold_memory):
            if adapter_name in buffers and buffers[adapter_name].device.type != "meta":
                buffers[adapter_name] = buffers[adapter_name].to(target)

    def __repr__(self) -> str:
        return f"snell.{super().__repr__()}"


def _init_factor(factor: Tensor, plan: LayerPlan) -> None:
    """As published, kaiming-uniform with a=√5 over each (H, features, r/H): U(−b, b), b = 1/√(features·r/H)."""
    if factor.device.type == "meta":
        return
    if plan.init_weights is False:
        nn.init.normal_(factor)
    elif plan.init_weights == "zeros":
        nn.init.zeros_(factor)
    else:
        bound = plan.init_scale / math.sqrt(factor.shape[-2] * factor.shape[-1])
        nn.init.uniform_(factor, -bound, bound)
