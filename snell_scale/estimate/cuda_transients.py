"""What the merge op's Triton kernels hold on a GPU while they run, for estimates made where there is none."""

from typing import Any

from torch import Tensor

from snell_scale.kernels.merge.operators import Call, merge_forward, merge_thresholds
from snell_scale.kernels.merge.triton_impl import (
    ENTRIES_PER_CANDIDATE,
    LOWER_BINS,
    MIN_CAPACITY,
    SAMPLE_SIZE,
    UPPER_BINS,
    gradient_scratch_bytes,
)

_FLOAT32, _INT32, _INT64 = 4, 4, 8


def triton_body_bytes(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """`BodyBytes` of the Triton implementation: its buffers, read off kernels/merge/walk.py and triton_impl.py.

    A GPU merges a weight whole: forward holds it beside its result; backward holds it, G and the scratch of the
    factors' gradients; a threshold has its candidates and two histograms.
    """
    assert not kwargs, "the op is called with positional arguments"
    if operator is merge_thresholds:
        return 0 if args[0] is None else _threshold_bytes(Call(*args[2:]))
    if operator is merge_forward:
        return _weight_bytes(Call(*args[5:]), like=args[0])
    dy, wanted, call = args[0], args[6], Call(*args[7:])
    merged = _weight_bytes(call, like=dy) if wanted[0] else 0
    G = (
        _weight_bytes(call, like=dy) + gradient_scratch_bytes(call.delta(is_dense=False))
        if any(wanted[3:])
        else 0
    )
    return merged + G


def _weight_bytes(call: Call, *, like: Tensor) -> int:
    return _num_entries(call) * like.element_size()


def _num_entries(call: Call) -> int:
    return call.num_out * call.A.shape[2]


def _threshold_bytes(call: Call) -> int:
    groups = call.A.shape[0]
    entries = _num_entries(call) // groups
    capacity = min(entries, max(MIN_CAPACITY, entries // ENTRIES_PER_CANDIDATE))
    return groups * (capacity * _INT32 + (UPPER_BINS + LOWER_BINS) * _INT64 + SAMPLE_SIZE * _FLOAT32)
