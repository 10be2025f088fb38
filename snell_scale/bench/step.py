"""`snell-scale bench step`: a whole training step of a timm model under every method."""

import gc
from collections.abc import Sequence
from functools import partial

import torch

from snell_scale.bench.cpu_libraries import products_note
from snell_scale.bench.memory import measure_peaks
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.report import Findings
from snell_scale.bench.settings import MKL_SIDE, StepSettings
from snell_scale.bench.step_gate import gate_step
from snell_scale.bench.step_sides import Case, side_phases
from snell_scale.bench.timing import check_not_interrupted, rows_of, time_sides
from snell_scale.bench.workloads import timm_workload


def bench_step(settings: StepSettings, progress: BenchProgress, findings: Findings | None = None) -> Findings:
    """Gate, memory and timings of a timm model for every rank; see `bench_case`."""
    findings = Findings() if findings is None else findings
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    workload = timm_workload(
        settings.model, device, batch_size=settings.batch_size, dtype=dtype, seed=settings.seed
    )
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
    ours = [side for side in ("snell", MKL_SIDE) if side in sides] or (["snell"] if "naive" in sides else [])
    if ours:
        progress.say(f"{case.name}: checking ours against the naive baseline")
        findings.add_gates(gate_step(case, ours))
    progress.say(f"{case.name}: peak memory, one side at a time")
    peaks, errors = measure_peaks(sides, partial(side_phases, case=case), case.device)
    gc.collect()
    running = {side: side_phases(side, case).run for side in peaks}
    with progress.rounds(f"{case.name}: timing {', '.join(running)}", repeats) as on_round:
        timings = time_sides(
            running, case.device, rounds=repeats, warmup_rounds=1, budget_s=budget_s, on_round=on_round
        )
    told = {side: products_note(side, case.device, dtype=case.dtype) for side in sides}
    notes = {side: note for side, note in told.items() if note}
    findings.rows += rows_of(case.name, timings, peaks=peaks, errors=errors, notes=notes)
    check_not_interrupted(timings)
