"""Seconds per training step and images per second, without a synchronisation inside a timed window."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch

_Mark: TypeAlias = "float | torch.cuda.Event"


class StepTimer:
    """Times steps: `start()`, the step, `stop(num_images)`; a step that is not typical is stopped as untimed.

    Timed are the steps after the first `num_warmup_steps`, those with timed=False (evaluation, checkpoint,
    instrumented step) excepted. A window is an unbroken run of timed steps.

    On CPU a step lasts from start() to stop() on the clock. On CUDA both record an event on the current
    stream: the device is synchronised where a window opens (so that earlier work does not count) and where
    it closes (an untimed step, or report()), and not between.

    A step does not include the wait for its batch, which the host's clock times; a GPU may compute meanwhile.
    """

    def __init__(
        self,
        device: torch.device,
        num_warmup_steps: int,
        *,
        num_devices: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """num_devices: those that share a step's images. clock: seconds. ValueError: negative warm-up."""
        if num_warmup_steps < 0:
            raise ValueError(f"num_warmup_steps: got {num_warmup_steps}, expected 0 or more")
        self._device = device
        self._clock = clock
        self._num_warmup_steps = num_warmup_steps
        self._num_devices = num_devices
        self._num_steps = 0
        self._wait_s = 0.0
        self._start: _Mark | None = None
        self._window_is_open = False
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()
        self._steps: list[tuple[float, int]] = []
        self._waits: list[float] = []

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around what hands out the batch of the step that is started next."""
        began = self._clock()
        yield
        self._wait_s = self._clock() - began

    def start(self) -> None:
        """The step begins. ValueError when the step before it was not stopped."""
        if self._start is not None:
            raise ValueError("StepTimer.start() twice: stop() the step before")
        if self._num_steps >= self._num_warmup_steps and not self._window_is_open:
            self._synchronize()
            self._window_is_open = True
        self._start = self._mark()

    def stop(self, num_images: int, *, timed: bool = True) -> None:
        """The step ends; it processed `num_images` (on all devices). ValueError without a start()."""
        if self._start is None:
            raise ValueError("StepTimer.stop() without start()")
        start, end, self._start = self._start, self._mark(), None
        wait_s, self._wait_s = self._wait_s, 0.0
        self._num_steps += 1
        if self._num_steps <= self._num_warmup_steps:
            return
        if not timed:
            self._close_window()
            return
        self._waits.append(wait_s)
        if isinstance(start, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
            self._pending.append((start, end, num_images))
            self._read_finished()
        else:
            assert not isinstance(end, torch.cuda.Event)
            self._steps.append((end - start, num_images))

    def report(self) -> dict[str, float | int | None]:
        """Over the timed steps, None without any. Ends the window.

        images_per_s: the median, with its 10th and 90th percentile, of all devices together; per_device: its
        share. step_ms: the median, 10th, 90th and 99th percentile. data_wait_percent: of the time of waits and
        steps together, what the waits for data took.
        """
        self._close_window()
        seconds = np.array([step_seconds for step_seconds, _ in self._steps])
        rates = np.array([num_images / step_seconds for step_seconds, num_images in self._steps])
        waits, images_per_s = np.array(self._waits), _percentile(rates, 50)
        return {
            "images_per_s": images_per_s,
            "images_per_s_p10": _percentile(rates, 10),
            "images_per_s_p90": _percentile(rates, 90),
            "images_per_s_per_device": None if images_per_s is None else images_per_s / self._num_devices,
            "step_ms_median": _percentile(1000 * seconds, 50),
            "step_ms_p10": _percentile(1000 * seconds, 10),
            "step_ms_p90": _percentile(1000 * seconds, 90),
            "step_ms_p99": _percentile(1000 * seconds, 99),
            "data_wait_ms_median": _percentile(1000 * waits, 50),
            "data_wait_percent": float(100 * waits.sum() / (waits.sum() + seconds.sum())) if waits.size else None,
            "num_timed_steps": len(self._steps),
        }

    def _mark(self) -> _Mark:
        if self._device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _close_window(self) -> None:
        if self._window_is_open:
            self._synchronize()
            self._read_finished()
            self._window_is_open = False

    def _read_finished(self) -> None:
        # query() asks without waiting, so a long window keeps only the few steps still in flight.
        while self._pending and self._pending[0][1].query():
            start, end, num_images = self._pending.popleft()
            self._steps.append((start.elapsed_time(end) / 1000, num_images))


def _percentile(values: np.ndarray, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values.size else None
