"""`snell-scale bench step`: a whole training step of a timm model under every method."""

import copy
import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from snell_scale.bench.memory import measure_peaks
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.report import Findings
from snell_scale.bench.settings import StepSettings
from snell_scale.bench.step_sides import (
    Case,
    adapted_layers,
    copy_factors,
    side_module,
    side_phases,
)
from snell_scale.bench.timing import rows_of, time_sides
from snell_scale.bench.workloads import timm_workload
from snell_scale.bench_records import Gate
from snell_scale.tuners.snell import SnellLayer

# An entry on the other side of a threshold moves one layer's ΔW by 1e-3 of its size, and with it the gradients;
# ViT-B's losses were seen to agree to 1e-5 in float32, its gradients to 2e-4.
_LOSS_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
_GRADIENT_LIMIT, _SHARE_LIMIT = 2e-2, 0.1
# ΔW's size in the gate, as a share of W0's: at the published start it would not show in the loss at all.
_DELTA_SHARE = 0.5
_GATE_SAMPLES = 1


def bench_step(settings: StepSettings, progress: BenchProgress) -> Findings:
    """Gate, memory and timings of a timm model for every rank; see `bench_case`."""
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    workload = timm_workload(
        settings.model, device, batch_size=settings.batch_size, dtype=dtype, seed=settings.seed
    )
    findings = Findings()
    for rank in settings.ranks:
        case = Case(workload, rank=rank, sparsity=settings.sparsity, device=device)
        bench_case(case, settings.sides, findings, progress, repeats=settings.repeats)
    return findings


def bench_case(
    case: Case,
    sides: Sequence[str],
    findings: Findings,
    progress: BenchProgress,
    *,
    repeats: int,
    budget_s: float | None = None,
) -> None:
    """Adds gates and rows to `findings`. RedGate where ours and the baseline differ: then nothing was timed.

    budget_s: of the timed rounds; see `time_sides`.
    """
    if {"naive", "snell"} & set(sides):
        progress.say(f"{case.name}: checking ours against the naive baseline")
        findings.add_gates(gate_step(case))
    progress.say(f"{case.name}: peak memory, one side at a time")
    peaks, errors = measure_peaks(sides, partial(side_phases, case=case), case.device)
    gc.collect()
    running = {side: side_phases(side, case).run for side in peaks}
    with progress.rounds(f"{case.name}: timing {', '.join(running)}", repeats) as on_round:
        timings = time_sides(
            running, case.device, rounds=repeats, warmup_rounds=1, budget_s=budget_s, on_round=on_round
        )
    findings.rows += rows_of(case.name, timings, peaks=peaks, errors=errors)


def gate_step(case: Case) -> list[Gate]:
    """Loss and factor gradients of both implementations with equal factors, large enough to show in them.

    In float32 whatever is timed: in a deep model bfloat16's own noise would hide a wrong delta. Where bfloat16 is
    timed, its losses are compared too.
    """
    exact, dtype = _in_float32(case), next(case.workload.bundle.module.parameters()).dtype
    (ours, our_gradients), (naive, naive_gradients) = _both(exact)
    frozen, _ = _loss_and_gradients(side_module("probe", exact), exact)
    apart, moved = abs(ours - naive), abs(naive - frozen)
    error = torch.linalg.vector_norm(our_gradients - naive_gradients) / torch.linalg.vector_norm(naive_gradients)
    share = apart / moved if moved else math.inf
    gates = [
        Gate(case.name, "relative difference of the losses", apart / abs(naive), _LOSS_LIMITS[torch.float32]),
        Gate(case.name, "that difference as a share of what ΔW does to the loss", share, _SHARE_LIMIT),
        Gate(case.name, "relative error of the factors' gradients", float(error), _GRADIENT_LIMIT),
    ]
    if dtype != torch.float32:
        (ours, _), (naive, _) = _both(case)
        name = f"relative difference of the losses in {str(dtype).removeprefix('torch.')}"
        gates.append(Gate(case.name, name, abs(ours - naive) / abs(naive), _LOSS_LIMITS[dtype]))
    return gates


def _both(case: Case) -> tuple[tuple[float, Tensor], tuple[float, Tensor]]:
    """(loss, gradients) of ours and of the baseline, with the same enlarged factors."""
    ours, naive = side_module("snell", case), side_module("naive", case)
    _enlarge(ours)
    copy_factors(ours, naive)
    return _loss_and_gradients(ours, case), _loss_and_gradients(naive, case)


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


def _loss_and_gradients(module: nn.Module, case: Case) -> tuple[float, Tensor]:
    """The loss on the first samples, and the gradients of all factors in one float64 vector."""
    workload = case.workload
    loss = workload.loss(module, {name: tensor[:_GATE_SAMPLES] for name, tensor in workload.batch.items()})
    factors = [factor for pair in adapted_layers(module) for factor in pair]
    gradients = torch.autograd.grad(loss, factors) if factors else []
    flat = [gradient.flatten().double() for gradient in gradients]
    return float(loss.detach()), torch.cat(flat) if flat else torch.empty(0)
