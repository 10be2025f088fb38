"""A model under every method, with its optimizer: the sides of `snell-scale bench step`."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snell_scale.bench.cpu_libraries import with_products_of
from snell_scale.bench.memory import Phases
from snell_scale.bench.naive_snell import NaiveSnell, NaiveSnellLinear
from snell_scale.bench.settings import MKL_SIDE
from snell_scale.bench.workloads import TARGETS, Workload
from snell_scale.interfaces import ModelBundle
from snell_scale.tuners.methods.base import always_trained, train_only
from snell_scale.tuners.methods.peft_methods import LoraMethodConfig, ShiraMethodConfig, SnellMethodConfig
from snell_scale.tuners.methods.plain import FullConfig
from snell_scale.tuners.snell import SnellLayer

# The published rate of the adapters, so that thresholds move as they do in training; and one at which a randomly
# initialised model stays finite on random data. Neither changes the time of a step.
_ADAPTER_LR, _FULL_LR = 1e-3, 1e-5


@dataclass(frozen=True)
class Case:
    """What every side of one case starts from; each takes a copy of the workload's model."""

    workload: Workload
    rank: int
    sparsity: float
    device: torch.device

    @property
    def name(self) -> str:
        return f"{self.workload.name} r={self.rank}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        return next(self.workload.bundle.module.parameters()).dtype


def side_module(side: str, case: Case) -> nn.Module:
    """A copy of the model under one method, in training mode."""
    bundle = replace(case.workload.bundle, module=copy.deepcopy(case.workload.bundle.module))
    return BUILDERS[side](bundle, case).to(case.device).train()


def side_phases(side: str, case: Case) -> Phases:
    """Forward, backward and update of one side."""
    module, loss_of = side_module(side, case), case.workload.loss
    batch = {name: tensor.clone() for name, tensor in case.workload.batch.items()}
    trained = [p for p in module.parameters() if p.requires_grad]
    lr = _FULL_LR if side == "full" else _ADAPTER_LR
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-2, fused=True)
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(loss_of(module, batch))

    def backward() -> None:
        losses.pop().backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    phases = Phases(module, (("forward", forward), ("backward", backward), ("step", step)))
    return with_products_of(side, phases)


def adapted_layers(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of every layer of ours or of the naive baseline, in the model's order."""
    factors = []
    for layer in module.modules():
        if isinstance(layer, SnellLayer):
            factors.append((layer.snell_A["default"], layer.snell_B["default"]))
        elif isinstance(layer, NaiveSnellLinear):
            factors.append((layer.A, layer.B))
    return factors


@torch.no_grad()
def copy_factors(source: nn.Module, target: nn.Module) -> None:
    """Give every layer of `target` the factors of the same layer of `source`."""
    for theirs, own in zip(adapted_layers(source), adapted_layers(target), strict=True):
        for value, parameter in zip(theirs, own, strict=True):
            parameter.copy_(value)


def _apply(method: Any, bundle: ModelBundle) -> nn.Module:
    return method.apply(bundle, total_steps=1, steps_per_epoch=1, seed=0).module


def _of_base_dtype(module: nn.Module, bundle: ModelBundle) -> nn.Module:
    """peft makes float32 adapters beside a bfloat16 base; in the base's dtype they are faster and smaller."""
    dtype = next(bundle.module.parameters()).dtype
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _probe(bundle: ModelBundle, case: Case) -> nn.Module:
    """Frozen but for the head, which a UNet has not: the method itself asks for one."""
    train_only(bundle.module, always_trained(bundle, train_extra=False))
    return bundle.module


def _full(bundle: ModelBundle, case: Case) -> nn.Module:
    return _apply(FullConfig(), bundle)


def _lora(bundle: ModelBundle, case: Case) -> nn.Module:
    return _of_base_dtype(_apply(LoraMethodConfig(r=case.rank, targets=TARGETS), bundle), bundle)


def _shira(bundle: ModelBundle, case: Case) -> nn.Module:
    return _of_base_dtype(_apply(ShiraMethodConfig(r=case.rank, targets=TARGETS), bundle), bundle)


def _snell(bundle: ModelBundle, case: Case) -> nn.Module:
    return _apply(SnellMethodConfig(r=case.rank, sparsity=case.sparsity, targets=TARGETS), bundle)


def _naive(bundle: ModelBundle, case: Case) -> nn.Module:
    """The baseline with the very factors that ours starts from."""
    ours = _snell(replace(bundle, module=copy.deepcopy(bundle.module)), case)
    module = NaiveSnell(r=case.rank, sparsity=case.sparsity, targets=TARGETS).apply(bundle)
    copy_factors(ours, module)
    return module


BUILDERS: Mapping[str, Callable[[ModelBundle, Case], nn.Module]] = {
    "probe": _probe,
    "lora": _lora,
    "shira": _shira,
    "full": _full,
    "naive": _naive,
    "snell": _snell,
    MKL_SIDE: _snell,
}
