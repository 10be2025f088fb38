"""Times several sides in one process, one after the other in every round, and compares them round by round."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from snell_scale.bench_records import BASES, Row

Call = Callable[[], object]
_MIN_ROUNDS = 3


@dataclass
class Timings:
    """milliseconds[side][round]; a side that ran out of memory is in `errors` instead."""

    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def time_sides(
    sides: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    warmup_rounds: int = 2,
    before: Callable[[str], None] | None = None,
    calls: int = 1,
    budget_s: float | None = None,
    on_round: Callable[[int], None] | None = None,
) -> Timings:
    """Warm up, then run every side once per round, in an order that moves on by one from round to round.

    Alternating spreads whatever drifts (clocks, heat, other work) evenly over the sides. `before(side)` runs
    outside of the timed window. A window holds `calls` calls and counts as their mean. With `budget_s` the
    rounds end early once that many seconds are used, but not before the third.
    """
    timings = Timings()
    running = dict(sides)
    started = time.perf_counter()
    for _ in range(warmup_rounds):
        for name in list(running):
            _warm_up(name, running, timings, before=before, device=device)
    timings.milliseconds = {name: [] for name in running}
    order = list(running)
    for index in range(rounds):
        if _is_over(started, budget_s) and index >= _MIN_ROUNDS:
            break
        # What the last round left is young; a full collection would take longer than many a side.
        gc.collect(1)
        with _no_collection():
            for name in order:
                if before is not None:
                    before(name)
                timings.milliseconds[name].append(time_call(running[name], device, calls=calls))
        order = [*order[1:], *order[:1]]
        if on_round is not None:
            on_round(index + 1)
    return timings


def time_call(call: Call, device: torch.device, *, calls: int = 1) -> float:
    """Milliseconds of one call, mean of `calls`; by events on CUDA, synchronised at both ends of the window."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return 1000 * (time.perf_counter() - started) / calls


def rows_of(
    case: str,
    timings: Timings,
    *,
    peaks: Mapping[str, int] | None = None,
    errors: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """One row per side, with its ratios to every base side that was timed beside it."""
    failed = {**timings.errors, **(errors or {})}
    names = [*timings.milliseconds, *(name for name in failed if name not in timings.milliseconds)]
    rows = []
    for name in names:
        samples = timings.milliseconds.get(name, [])
        spread = spread_of(samples) if samples else {}
        rows.append(
            Row(
                case=case,
                side=name,
                rounds=len(samples),
                median_ms=spread.get("median"),
                p10_ms=spread.get("p10"),
                p90_ms=spread.get("p90"),
                peak_bytes=(peaks or {}).get(name),
                ratios=_ratios(name, timings.milliseconds) if samples else {},
                note=(notes or {}).get(name),
                error=failed.get(name),
            )
        )
    return rows


def spread_of(samples: Sequence[float]) -> dict[str, float]:
    """{"median", "p10", "p90"} of the samples."""
    median, p10, p90 = (float(np.percentile(samples, percent)) for percent in (50, 10, 90))
    return {"median": median, "p10": p10, "p90": p90}


def _ratios(side: str, milliseconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    own = np.array(milliseconds[side])
    bases = [base for base in BASES if base != side and base in milliseconds]
    return {base: spread_of((own / np.array(milliseconds[base])).tolist()) for base in bases}


def _warm_up(
    name: str,
    running: dict[str, Call],
    timings: Timings,
    *,
    before: Callable[[str], None] | None,
    device: torch.device,
) -> None:
    try:
        if before is not None:
            before(name)
        running[name]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        del running[name]
        timings.errors[name] = f"out of memory: {str(error).splitlines()[0]}"


def _is_over(started: float, budget_s: float | None) -> bool:
    return budget_s is not None and time.perf_counter() - started > budget_s


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection would land in somebody's window."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
