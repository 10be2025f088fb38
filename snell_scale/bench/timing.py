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
    """milliseconds[side][round]; a side that ran out of memory is in `errors` instead.

    Every side has the same rounds. interrupted: by the user, before all that were asked for.
    """

    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


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
    rounds end early once that many seconds are used, but not before the third. Ctrl-C ends them at once, and
    what the rounds before gave is returned: `check_not_interrupted` raises it again when that is safe.
    """
    timings = Timings({name: [] for name in sides})
    started = time.perf_counter()
    try:
        for _ in range(warmup_rounds):
            for name in list(timings.milliseconds):
                _attempt(name, sides[name], timings, before=before, device=device)
        for index in range(rounds):
            if _is_over(started, budget_s) and index >= _MIN_ROUNDS:
                break
            # What the last round left is young; a full collection would take longer than many a side.
            gc.collect(1)
            with _no_collection():
                for name in _turned(list(timings.milliseconds), index):
                    _attempt(name, sides[name], timings, before=before, device=device, timed_calls=calls)
            if on_round is not None:
                on_round(index + 1)
    except KeyboardInterrupt:
        timings.interrupted = True
        complete = min(map(len, timings.milliseconds.values()), default=0)
        timings.milliseconds = {name: times[:complete] for name, times in timings.milliseconds.items()}
    return timings


def check_not_interrupted(timings: Timings) -> None:
    """KeyboardInterrupt where Ctrl-C ended the rounds: to be called once their rows are kept."""
    if timings.interrupted:
        raise KeyboardInterrupt


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
        told = [(notes or {}).get(name)]
        if timings.interrupted and name in timings.milliseconds:
            told.append(f"interrupted after {len(samples)} rounds")
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
                note="; ".join(note for note in told if note) or None,
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


def _attempt(
    name: str,
    call: Call,
    timings: Timings,
    *,
    before: Callable[[str], None] | None,
    device: torch.device,
    timed_calls: int | None = None,
) -> None:
    """A warm-up, or a timed window of so many calls; a side that finds no memory is out from here on."""
    try:
        if before is not None:
            before(name)
        if timed_calls is not None:
            timings.milliseconds[name].append(time_call(call, device, calls=timed_calls))
            return
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        # Its rounds so far go too: those of the others would have no partners to form ratios with.
        del timings.milliseconds[name]
        timings.errors[name] = f"out of memory: {(str(error) or 'no message').splitlines()[0]}"


def _is_out_of_memory(error: Exception) -> bool:
    # On the host it is a plain RuntimeError in torch.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _turned(names: list[str], by: int) -> list[str]:
    return [*names[by % len(names) :], *names[: by % len(names)]] if names else []


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
