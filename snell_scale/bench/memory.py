"""Peak memory of one side: every byte that torch's allocators hand out during a step, apart from all timing.

Not from instrument's MemoryProbe, which sees what goes in and out of operators: the work space inside of them,
such as that of cdist's backward, would not count here.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "snell_scale.bench: "


@dataclass(frozen=True)
class Phases:
    """A step in parts, e.g. ("forward", …), ("backward", …), ("step", …)."""

    module: nn.Module
    parts: Sequence[tuple[str, Callable[[], object]]]

    def run(self) -> None:
        """All of it, unwatched: what is timed."""
        for _, part in self.parts:
            part()


@dataclass(frozen=True)
class PartBytes:
    """Bytes that a side holds: the most during a part, and at its end."""

    peak: int
    end: int


def peak_bytes(build: Callable[[], Phases], device: torch.device) -> int:
    """The most bytes at once during the second step of a side that is built here and freed again.

    Counts the side's weights, frozen ones included, its inputs, activations, gradients, optimizer state and all
    work space from torch's allocators; not what numpy or a library allocates by itself.
    """
    return max(part.peak for part in part_bytes(build, device).values())


def measure_peaks(
    sides: Sequence[str], build: Callable[[str], Phases], device: torch.device
) -> tuple[dict[str, int], dict[str, str]]:
    """`peak_bytes` of every side; of one that cannot run (no memory, an operator that is missing) the reason."""
    peaks, errors = {}, {}
    for side in sides:
        try:
            peaks[side] = peak_bytes(partial(build, side), device)
        except RuntimeError as error:
            errors[side] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    return peaks, errors


def part_bytes(build: Callable[[], Phases], device: torch.device) -> dict[str, PartBytes]:
    """As `peak_bytes`, by part. The first step is not watched, so that optimizer state and thresholds exist."""
    return _on_cuda(build, device) if device.type == "cuda" else _on_cpu(build)


def memory_source(device: torch.device) -> str:
    """What is counted, for the record."""
    is_cuda = device.type == "cuda"
    allocator = f"torch's {'CUDA' if is_cuda else 'CPU'} allocator"
    within = "inside libraries (what they allocate by themselves)"
    if not is_cuda:
        within = "inside oneDNN (copies of weights that it reorders) and numpy"
    return (
        f"{allocator}, one side at a time, frozen weights and inputs included; work space {within} is not counted"
    )


def clear_gradients(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def _on_cuda(build: Callable[[], Phases], device: torch.device) -> dict[str, PartBytes]:
    gc.collect()  # what a side before left in cycles would be freed within this one's window
    before = torch.cuda.memory_allocated(device)
    phases = build()
    phases.run()
    found = {}
    for name, part in phases.parts:
        torch.cuda.reset_peak_memory_stats(device)
        part()
        peak, end = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        found[name] = PartBytes(peak - before, end - before)
    return found


def _on_cpu(build: Callable[[], Phases]) -> dict[str, PartBytes]:
    # The profiler reports no release of what was allocated before it began: so the side is built inside.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        phases = build()
        phases.run()
        for name, part in phases.parts:
            with record_function(_MARK + name):
                part()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events: Any = results.events()  # torch's stubs leave out nbytes
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    windows = {
        event.name().removeprefix(_MARK): (event.start_ns(), event.end_ns())
        for event in events
        if event.name().startswith(_MARK)
    }
    return {name: _within(changes, *window) for name, window in windows.items()}


def _within(changes: Sequence[tuple[int, int]], start: int, end: int) -> PartBytes:
    live, peak = 0, 0
    for instant, num_bytes in changes:
        if instant > end:
            break
        if instant >= start:
            peak = max(peak, live)
        live += num_bytes
        if instant >= start:
            peak = max(peak, live)
    return PartBytes(max(peak, live), live)
