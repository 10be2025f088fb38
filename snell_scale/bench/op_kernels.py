"""The op's parts alone: merge and threshold as the profiler sees them, a plain copy, and the transient memory."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from snell_scale.bench.layer_sides import Layer, MergedLinear, between_rounds, side_phases
from snell_scale.bench.memory import part_bytes
from snell_scale.bench.timing import spread_of
from snell_scale.bench_records import Aim, Row

# Names that the op registers with torch, and that of its Triton kernel.
_THRESHOLDS, _FORWARD, _MERGE_KERNEL = (
    "snell_scale::merge_thresholds",
    "snell_scale::merge_forward",
    "_merge_fwd_kernel",
)
# Weights are taken in turn from so many bytes, more than any cache holds, as the layers of a model would be.
_ROTATED_BYTES, _MOST_ROTATED = 512 << 20, 64
_WARM_STEPS = 3


def kernel_rows(case: str, layer: Layer, *, repeats: int) -> tuple[list[Row], list[Aim]]:
    """Device time of a copy of W0, of the merge and of the threshold (warm, cold), and the aims about them.

    On CPU the registered operators' own time stands for the kernels': the merge then includes the product with
    one token. RuntimeError where the profiler saw no such operator.
    """
    modules = _rotated(layer)
    device = layer.weight.device
    samples = {"copy of W0": _copy_times([module.weight for module in modules], device, repeats=repeats)}
    for side in ("snell", "snell-cold"):
        merge, threshold = _op_times(side, modules, layer.x[:1], repeats=repeats)
        samples[f"threshold {'cold' if side == 'snell-cold' else 'warm'}"] = threshold
        samples.setdefault("merge", merge)
    rows = [_row(case, name, values, layer) for name, values in samples.items()]
    medians = {row.side: row.median_ms for row in rows if row.median_ms is not None}
    ratio = {name: medians[name] / medians["merge"] for name in medians}
    aims = [
        Aim(case, "merge / copy of W0", 1.5, medians["merge"] / medians["copy of W0"]),
        Aim(case, "threshold (warm) / merge", 1.0, ratio["threshold warm"], note="as in training"),
        Aim(case, "threshold (cold) / merge", 1.0, ratio["threshold cold"], note="first step only"),
        Aim(case, "transient of one layer, in (m, n) buffers", 2.0, transient_buffers(layer)),
    ]
    return rows, aims


def transient_buffers(layer: Layer) -> float:
    """The most that forward or backward holds beyond what is left at its end, in buffers of W0's size."""
    parts = part_bytes(partial(side_phases, "snell", layer), layer.weight.device).values()
    return max(part.peak - part.end for part in parts) / _bytes(layer.weight)


def _rotated(layer: Layer) -> list[MergedLinear]:
    count = max(1, min(_MOST_ROTATED, _ROTATED_BYTES // _bytes(layer.weight)))
    is_small = layer.weight.device.type != "cuda"
    return [MergedLinear(layer) for _ in range(1 if is_small else count)]


def _op_times(
    side: str, modules: Sequence[MergedLinear], x: Tensor, *, repeats: int
) -> tuple[list[float], list[float]]:
    """(merge, threshold): milliseconds of every call."""
    turn = [modules[index % len(modules)] for index in range(repeats)]

    def calls() -> None:
        for module in turn:
            between_rounds(side, module)
            module(x)

    with torch.no_grad():
        for _ in range(_WARM_STEPS):
            for module in modules:
                between_rounds(side, module)
                module(x)
        events = _profiled(calls, x.device)
    merge = _MERGE_KERNEL if x.device.type == "cuda" else _FORWARD
    return _named(events, merge, x.device), _named(events, _THRESHOLDS, x.device)


def _copy_times(weights: Sequence[Tensor], device: torch.device, *, repeats: int) -> list[float]:
    targets = [torch.empty_like(weight) for weight in weights]

    def calls() -> None:
        for index in range(repeats):
            targets[index % len(weights)].copy_(weights[index % len(weights)].detach())

    calls()
    return _named(_profiled(calls, device), "aten::copy_", device)


def _profiled(calls: Callable[[], None], device: torch.device) -> list[FunctionEvent]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        calls()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return list(profiler.events() or [])


def _named(events: Sequence[FunctionEvent], name: str, device: torch.device) -> list[float]:
    """Milliseconds of every event of that name: a kernel's own; of an operator those of all kernels under it.

    On CPU the operator's own. RuntimeError where nothing was seen: names change, and no time is not a short time.
    """
    times = []
    for event in events:
        if name in event.name:
            if device.type != "cuda":
                times.append(event.cpu_time_total / 1000)
            elif event.device_type == DeviceType.CUDA:
                times.append(event.time_range.elapsed_us() / 1000)
            else:
                times.append(event.device_time_total / 1000)
    if not times or not any(times):
        raise RuntimeError(f"the profiler saw no time of {name!r} on {device}")
    return times


def _row(case: str, name: str, values: Sequence[float], layer: Layer) -> Row:
    spread = spread_of(values)
    note = None
    if name == "copy of W0":
        note = f"{2 * _bytes(layer.weight) / spread['median'] / 1e6:,.0f} GB/s read and written"
    return Row(
        case=case,
        side=name,
        rounds=len(values),
        median_ms=spread["median"],
        p10_ms=spread["p10"],
        p90_ms=spread["p90"],
        note=note,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
