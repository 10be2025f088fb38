"""The counters of CUDA's caching allocator over a run: what was reserved beside allocated, retries, fragments."""

import contextlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_COUNTERS = ("num_alloc_retries", "num_ooms")


class AllocatorMeter:
    """Follows the allocator of one device; on other devices it does nothing and reports None.

    Between steps it only asks the allocator for its counters, on the host: the device is not waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reserved = array("q")
        self._peaks: dict[str, int] = {}
        self._before = dict.fromkeys(_COUNTERS, 0)
        if device.type == "cuda":
            # An earlier attempt in this process, one that ran out of memory, is not this one's.
            counters = torch.cuda.memory_stats(device)
            self._before = {name: counters.get(name, 0) for name in _COUNTERS}
            torch.cuda.reset_peak_memory_stats(device)

    def observe(self) -> None:
        """Once a step: what is reserved now."""
        if self._device.type == "cuda":
            counters = torch.cuda.memory_stats_as_nested_dict(self._device)
            self._reserved.append(counters["reserved_bytes"]["all"]["current"])

    def reset_peaks(self) -> None:
        """Start the allocator's own peaks anew; those of before stay known here."""
        if self._device.type == "cuda":
            self._keep_peaks()
            torch.cuda.reset_peak_memory_stats(self._device)

    @contextlib.contextmanager
    def leaving_out(self) -> Iterator[None]:
        """What is allocated inside is no part of the report: an evaluation's batch has a size of its own.

        What it leaves in the allocator's cache is reserved from then on, and counts as that.
        """
        self.reset_peaks()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)

    def report(self) -> dict[str, Any] | None:
        """Since this meter was made, without evaluations; None where its device is no CUDA device.

        accelerator_memory_max, accelerator_memory_reserved_avg and accelerator_memory_reserved_99th as in PEFT's
        method_comparison: the largest reserved, and mean and 99th percentile over the steps (None before one).
        allocated_peak_bytes: the most that tensors took of it. inactive_split_peak_bytes: the most that lay free
        in blocks that are partly in use. fragmentation: 1 - allocated peak / reserved peak, the share of what is
        reserved that tensors never filled; the two peaks need not be of one moment. num_alloc_retries: flushes of
        the cache before an allocation succeeded, each a wait for the device. num_ooms: allocations that failed.
        """
        if self._device.type != "cuda":
            return None
        self._keep_peaks()
        counters = torch.cuda.memory_stats(self._device)
        reserved, allocated = self._peaks["reserved_bytes"], self._peaks["allocated_bytes"]
        steps = np.frombuffer(self._reserved, dtype=np.int64)
        return {
            "accelerator_memory_max": reserved,
            "accelerator_memory_reserved_avg": int(steps.mean()) if steps.size else None,
            "accelerator_memory_reserved_99th": int(np.percentile(steps, 99)) if steps.size else None,
            "allocated_peak_bytes": allocated,
            "inactive_split_peak_bytes": self._peaks["inactive_split_bytes"],
            "fragmentation": 1 - allocated / reserved if reserved else 0.0,
            **{name: counters.get(name, 0) - before for name, before in self._before.items()},
        }

    def _keep_peaks(self) -> None:
        counters = torch.cuda.memory_stats(self._device)
        for name in ("reserved_bytes", "allocated_bytes", "inactive_split_bytes"):
            self._peaks[name] = max(self._peaks.get(name, 0), counters.get(f"{name}.all.peak", 0))
