"""A SNELL layer: wraps a module and keeps the factors of its weights' deltas W0 + ΔW (arXiv 2411.01800).

For G stacked matrices and H distance components, `snell_A[adapter]` has shape (G, H, in, r/H), `snell_B[adapter]`
(G, H, out/G, r/H), and `snell_alpha`, `snell_gamma`, `snell_beta` (G,) where the kernel has them; all are float32
(float64 under a float64 base), for distances are differences of close numbers. `snell_sparsity` (G,) float64
exists where matrices compete for the non-zeros.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import TypedDict

import torch
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
    """What every adapted module shares: the adapters' parameters, and merging into the base weights."""

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

    def update_layer(self, adapter_name: str, plan: LayerPlan, *, inference_mode: bool) -> None:
        """Give the layer one more adapter, its parameters fresh."""
        weight = self._weights()[0]
        out_features, in_features = matrix_shape(self.get_base_layer())
        groups, components, columns = plan.num_groups, plan.num_components, plan.rank // plan.num_components
        self.snell_plan[adapter_name] = plan
        shapes = {"A": (groups, components, in_features, columns)}
        shapes["B"] = (groups, components, out_features // groups, columns)
        start = KERNEL_PARAMETERS[plan.kernel]
        device = torch.device("meta") if weight.device.type == "meta" else None
        dtype = torch.promote_types(weight.dtype, torch.float32)
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
        """ΔW of all the layer's matrices, stacked along the output, in the factors' dtype."""
        return delta_weight(
            self.snell_A[adapter_name], self.snell_B[adapter_name], **self._merge_arguments(adapter_name)
        )

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
            merged = self._weights_plus(name, sign=1)
            if safe_merge and not all(bool(torch.isfinite(weight).all()) for weight in merged):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._set_weights(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged deltas out of the base weight again, exact up to rounding in its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.snell_A:
                self._set_weights(self._weights_plus(name, sign=-1))

    def cast_factors_as_base(self, adapter_name: str) -> None:
        """Give an adapter's factors and kernel scalars the base weight's dtype."""
        dtype = self._weights()[0].dtype
        for container in self._parameters_of_adapters():
            if adapter_name in container:
                parameter = container[adapter_name]
                container[adapter_name] = nn.Parameter(parameter.data.to(dtype), parameter.requires_grad)

    @abstractmethod
    def _weights(self) -> tuple[Tensor, ...]:
        """The base weights (Parameters) that ΔW is added to, in the order in which its rows are stacked."""

    def _active_here(self) -> list[str]:
        """The adapters that a forward applies; [] where the base is to be called, unmerged if it has to be."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.snell_A]

    def _is_noisy(self, adapter_name: str, dropout: float) -> bool:
        """Whether the delta has to be a product of its own: of inputs or outputs partly dropped."""
        return self.training and (dropout > 0 or self.snell_plan[adapter_name].drop_path > 0)

    def _without_some_samples(self, y: Tensor, adapter_name: str, *, is_batched: bool = True) -> Tensor:
        """Drop path on a delta's output, whose first dimension counts samples if it is batched."""
        drop_path = self.snell_plan[adapter_name].drop_path
        if not self.training or drop_path == 0:
            return y
        keep = 1 - drop_path
        shape = (y.shape[0], *(1 for _ in y.shape[1:])) if is_batched else (1,) * y.dim()
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
    def _weights_plus(self, adapter_name: str, *, sign: int) -> list[Tensor]:
        weights, delta = self._weights(), self.get_delta_weight(adapter_name)
        parts = delta.split([weight.shape[0] for weight in weights])
        return [
            (weight.to(torch.promote_types(weight.dtype, part.dtype)) + sign * part.view(weight.shape)).to(
                weight.dtype
            )
            for weight, part in zip(weights, parts, strict=True)
        ]

    def _set_weights(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights(), values, strict=True):
            weight.data.copy_(value)

    def _parameters_of_adapters(self) -> list[nn.ParameterDict]:
        return [getattr(self, name) for name in self.adapter_layer_names]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT's hook, also called after loading. PEFT would cast to the base's dtype; factors keep theirs."""
        target = device or self._weights()[0].device
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
