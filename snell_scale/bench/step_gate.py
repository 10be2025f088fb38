"""The gate of `bench step`: ours against the naive baseline, with equal factors that show in the loss."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from snell_scale.bench.cpu_libraries import products_of
from snell_scale.bench.merge_gate import relative_error
from snell_scale.bench.step_sides import Case, adapted_layers, copy_factors, side_module
from snell_scale.bench_records import Gate
from snell_scale.tuners.snell import SnellLayer

# An entry on the other side of a threshold moves one layer's ΔW by 1e-3 of its size, and with it the gradients;
# ViT-B's losses were seen to agree to 1e-5 in float32, its gradients to 2e-4. In bfloat16, gradients of ours were
# 0.1 to 2 % away from the baseline's, as far as both were from float32's: five times that, for deeper models.
_LOSS_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
_GRADIENT_LIMITS = {torch.float32: 2e-2, torch.bfloat16: 1e-1}
_SHARE_LIMIT = 0.1
# ΔW's size in the gate, as a share of W0's: at the published start it would not show in the loss at all.
_DELTA_SHARE = 0.5
# One step of the optimizer between the cold and the warm check, as a share of the factors' spread.
_STEP_SHARE = 1e-3
_GATE_SAMPLES = 1


@dataclass(frozen=True)
class _Seen:
    """What the first samples gave: the loss, and the gradients of all factors in one float64 vector."""

    loss: float
    gradients: Tensor


def gate_step(case: Case, sides: Sequence[str] = ("snell",)) -> list[Gate]:
    """Loss and factor gradients of our sides and the baseline with equal factors, large enough to show in them.

    Twice: with no threshold remembered, and as it is timed, after the factors have moved. In float32 whatever is
    timed: in a deep model bfloat16's own noise would hide a wrong delta. Where bfloat16 is timed, its losses and
    gradients are compared too.
    """
    exact = _in_float32(case)
    frozen = _look(side_module("probe", exact), exact).loss
    gates = _compare(exact, sides, frozen=frozen)
    return gates if case.dtype == torch.float32 else gates + _compare(case, sides, frozen=None)


def _compare(case: Case, sides: Sequence[str], *, frozen: float | None) -> list[Gate]:
    """Cold and warm. frozen: the loss without ΔW; without it the difference as a share of ΔW's is left out."""
    naive = side_module("naive", case)
    ours = {side: side_module(side, case) for side in sides}
    first, *others = ours.values()
    _enlarge(first)
    gates = []
    for state in ("", ", warm"):
        if state:
            _move(first)
        for module in (*others, naive):
            copy_factors(first, module)
        expected = _look(naive, case)
        for side, module in ours.items():
            with products_of(side):
                seen = _look(module, case)
            gates += _gates_of(f"{side}{state}", seen, expected, case, frozen=frozen)
    return gates


def _gates_of(who: str, seen: _Seen, expected: _Seen, case: Case, *, frozen: float | None) -> list[Gate]:
    apart = abs(seen.loss - expected.loss)
    within = "" if case.dtype == torch.float32 else f" in {str(case.dtype).removeprefix('torch.')}"
    limits = _LOSS_LIMITS[case.dtype], _GRADIENT_LIMITS[case.dtype]
    values = apart / abs(expected.loss), relative_error(seen.gradients, expected.gradients)
    gates = [
        Gate(case.name, f"{who}: relative {what}{within}", value, limit)
        for what, value, limit in zip(
            ("difference of the losses", "error of the factors' gradients"), values, limits, strict=True
        )
    ]
    if frozen is not None:
        moved = abs(expected.loss - frozen)
        what = f"{who}: difference of the losses as a share of what ΔW does to the loss"
        gates.append(Gate(case.name, what, apart / moved if moved else math.inf, _SHARE_LIMIT))
    return gates


@torch.no_grad()
def _move(module: nn.Module) -> None:
    """Every factor up or down by a small step, as an optimizer would."""
    for pair in adapted_layers(module):
        for factor in pair:
            factor.add_(torch.randn_like(factor).sign_() * factor.std(), alpha=_STEP_SHARE)


def _in_float32(case: Case) -> Case:
    workload = case.workload
    bundle = replace(workload.bundle, module=copy.deepcopy(workload.bundle.module).float())
    batch = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in workload.batch.items()
    }
    return replace(case, workload=replace(workload, bundle=bundle, batch=batch))


@torch.no_grad()
def _enlarge(module: nn.Module) -> None:
    """Scale the factors so that ΔW, which grows with their square, is of W0's order."""
    for layer in module.modules():
        if isinstance(layer, SnellLayer):
            base = layer.get_base_layer()
            assert isinstance(base, nn.Linear)
            share = layer.get_delta_weight("default").std() / base.weight.float().std()
            factor = (_DELTA_SHARE / share) ** 0.5
            layer.snell_A["default"].mul_(factor)
            layer.snell_B["default"].mul_(factor)


def _look(module: nn.Module, case: Case) -> _Seen:
    """Forward and backward on the first samples."""
    workload = case.workload
    loss = workload.loss(module, {name: tensor[:_GATE_SAMPLES] for name, tensor in workload.batch.items()})
    factors = [factor for pair in adapted_layers(module) for factor in pair]
    gradients = torch.autograd.grad(loss, factors) if factors else []
    flat = [gradient.flatten().double() for gradient in gradients]
    return _Seen(float(loss.detach()), torch.cat(flat) if flat else torch.empty(0))
