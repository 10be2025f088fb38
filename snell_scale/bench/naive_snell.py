"""SNELL as published, written afresh as the baseline that `merge_linear` is timed against.

Follows github.com/ssfgunner/SNELL @ e9d5185 : model/vision_transformer_timm.py, classes SNELL, TuningModule,
AttentionSNELLParallel and MlpSNELLParallel: distances by torch.cdist, the threshold from a sort of the whole
matrix read back to the host, the delta as a branch beside the frozen layer, and that branch recomputed in the
backward pass.

Two departures, both in the baseline's favour or without effect on its time: the order statistic is taken from the
sort itself (torch.quantile, which sorts too, computes the rank in float32 and refuses more than 2^24 elements),
and checkpointing is the non-reentrant kind (the other loses the gradients of a layer whose input needs none).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_scale.interfaces import ModelBundle
from snell_scale.tuners.methods.base import always_trained, find_targets, matching_modules, train_only


class NaiveSnellLinear(nn.Module):
    """y = base(x) + x ΔWᵀ, the second product in a branch of its own.

    A: (G, H, in, r/H), B: (G, H, out/G, r/H), float32: G matrices stacked along out, each with its own threshold.
    """

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, *, sparsity: float, scale: float = 0.1) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.sparsity = sparsity
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        branches = [
            checkpoint(self._branch, x, self.A[group], self.B[group], use_reentrant=False)
            for group in range(self.A.shape[0])
        ]
        return self.base(x) + (branches[0] if len(branches) == 1 else torch.cat(branches, dim=-1))

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        # (H, in, out) as published; factors stay float32 where x is bfloat16.
        distances = torch.cdist(A, B, p=2.0)
        signs = torch.tensor([self.scale * (-1) ** h for h in range(len(A))], device=A.device, dtype=A.dtype)
        K = (signs[:, None, None] * distances).sum(dim=0)
        return F.linear(x, self._sparsified(K).T.to(x.dtype))

    def _sparsified(self, K: Tensor) -> Tensor:
        magnitude = K.detach().abs()
        rank = int(self.sparsity * (K.numel() - 1))
        threshold = magnitude.flatten().sort().values[rank]
        return K * F.threshold(magnitude, float(threshold), 0)


@dataclass(frozen=True)
class NaiveSnell:
    """The method, as far as a benchmark needs it; `apply` like the configs of tuners.methods."""

    r: int
    sparsity: float
    targets: str = "linear"
    num_components: int = 2

    def apply(self, bundle: ModelBundle) -> nn.Module:
        """Replace the targeted layers in place and freeze all but factors and head. Factors are all zeros."""
        module = bundle.module
        names = matching_modules(module, find_targets(bundle, self.targets))
        trained = always_trained(bundle, train_extra=False)
        for name in names:
            layer = module.get_submodule(name)
            assert isinstance(layer, nn.Linear), "the group 'linear' holds linear layers"
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, self._wrapped(layer, _num_groups(bundle, name)))
            trained |= {f"{name}.A", f"{name}.B"}
        train_only(module, trained)
        return module

    def _wrapped(self, layer: nn.Linear, num_groups: int) -> NaiveSnellLinear:
        columns = self.r // self.num_components
        shape_a = (num_groups, self.num_components, layer.in_features, columns)
        shape_b = (num_groups, self.num_components, layer.out_features // num_groups, columns)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        A, B = (torch.zeros(shape, device=layer.weight.device, dtype=dtype) for shape in (shape_a, shape_b))
        return NaiveSnellLinear(layer, A, B, sparsity=self.sparsity)


def _num_groups(bundle: ModelBundle, name: str) -> int:
    return bundle.fused_groups.get(name.rpartition(".")[2], 1)
