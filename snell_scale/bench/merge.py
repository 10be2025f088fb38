"""`snell-scale bench merge`: forward and backward of one linear layer under every method."""

from functools import partial

import torch

from snell_scale.bench.cpu_libraries import products_note
from snell_scale.bench.layer_sides import Layer, between_rounds, make_layer, side_module, side_phases
from snell_scale.bench.memory import measure_peaks
from snell_scale.bench.merge_gate import gate_layer
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.report import Findings
from snell_scale.bench.settings import MKL_SIDE, MergeSettings, shape_name
from snell_scale.bench.timing import check_not_interrupted, rows_of, time_sides

# Each gate, and the sides that it stands for.
_GATES = {"naive": ("naive",), "snell": ("snell", "snell-cold"), MKL_SIDE: (MKL_SIDE,)}
_WARM = "the threshold's search starts where the last one ended"
_NOTES = {
    "naive": "as published: a branch, cdist, sort, recomputed",
    "snell": _WARM,
    "snell-cold": "the threshold's search starts from nothing in every round",
    MKL_SIDE: _WARM,
}


def bench_merge(
    settings: MergeSettings,
    progress: BenchProgress,
    findings: Findings | None = None,
    *,
    budget_s: float | None = None,
) -> Findings:
    """Add gates, memory and timings of every shape. RedGate where a gate is red: then nothing was timed.

    budget_s: of the timed rounds of one shape; see `time_sides`. Ctrl-C: the rows so far are in `findings`.
    """
    findings = Findings() if findings is None else findings
    device = torch.device(settings.device)
    for shape in settings.shapes:
        case = f"{shape_name(shape)} r={settings.rank}"
        layer = make_layer(
            shape,
            device,
            num_tokens=settings.tokens,
            rank=settings.rank,
            sparsity=settings.sparsity,
            dtype=getattr(torch, settings.dtype),
            implementation=settings.implementation,
            seed=settings.seed,
        )
        progress.say(f"{case}: checking against the reference")
        gated = [gate for gate, sides in _GATES.items() if set(sides) & set(settings.sides)]
        findings.add_gates(gate_layer(case, layer, {side: partial(side_module, side) for side in gated}))
        _measure(case, layer, settings, findings, progress, budget_s=budget_s)
    return findings


def _measure(
    case: str,
    layer: Layer,
    settings: MergeSettings,
    findings: Findings,
    progress: BenchProgress,
    *,
    budget_s: float | None,
) -> None:
    device = torch.device(settings.device)
    progress.say(f"{case}: peak memory, one side at a time")
    peaks, errors = measure_peaks(settings.sides, partial(side_phases, layer=layer), device)
    sides = {side: side_phases(side, layer) for side in peaks}
    with progress.rounds(f"{case}: timing {', '.join(sides)}", settings.repeats) as on_round:
        timings = time_sides(
            {side: phases.run for side, phases in sides.items()},
            device,
            rounds=settings.repeats,
            before=lambda side: between_rounds(side, sides[side].module),
            budget_s=budget_s,
            on_round=on_round,
        )
    findings.rows += rows_of(case, timings, peaks=peaks, errors=errors, notes=_notes(settings, device))
    check_not_interrupted(timings)


def _notes(settings: MergeSettings, device: torch.device) -> dict[str, str]:
    notes = {}
    for side in settings.sides:
        dtype, implementation = getattr(torch, settings.dtype), settings.implementation
        products = products_note(side, device, dtype=dtype, implementation=implementation)
        notes[side] = "; ".join(note for note in (_NOTES.get(side), products) if note)
    return notes
