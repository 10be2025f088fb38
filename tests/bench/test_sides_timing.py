"""Rounds in turn, windows without what lies between them, and ratios formed round by round."""

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from snell_scale.bench import timing
from snell_scale.bench.timing import Timings, check_not_interrupted, rows_of, time_call, time_sides

CPU = torch.device("cpu")


class Clock:
    """Stands still but when told to move."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def taking(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.seconds += seconds

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", made)
    return made


def test_every_side_runs_once_per_round_in_a_moving_order() -> None:
    ran: list[str] = []
    sides = {name: lambda name=name: ran.append(name) for name in "abc"}
    rounds: list[int] = []
    timings = time_sides(sides, CPU, rounds=3, warmup_rounds=1, on_round=rounds.append)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab"
    assert rounds == [1, 2, 3]
    assert {name: len(samples) for name, samples in timings.milliseconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_what_happens_between_rounds_is_not_timed(clock: Clock) -> None:
    prepared: list[str] = []

    def before(side: str) -> None:
        prepared.append(side)
        clock.seconds += 100

    timings = time_sides({"a": clock.taking(0.5)}, CPU, rounds=3, warmup_rounds=2, before=before)
    assert timings.milliseconds == {"a": [500.0] * 3}
    assert len(prepared) == 5


def test_no_collection_inside_a_window() -> None:
    enabled: list[bool] = []
    time_sides({"a": lambda: enabled.append(gc.isenabled())}, CPU, rounds=3, warmup_rounds=0)
    assert enabled == [False] * 3
    assert gc.isenabled()


def test_a_budget_ends_the_rounds_after_the_third(clock: Clock) -> None:
    timings = time_sides({"a": clock.taking(2.0)}, CPU, rounds=50, warmup_rounds=1, budget_s=1.0)
    assert len(timings.milliseconds["a"]) == 3
    timings = time_sides({"a": clock.taking(2.0)}, CPU, rounds=50, warmup_rounds=0, budget_s=13.0)
    assert len(timings.milliseconds["a"]) == 7


def test_a_window_of_several_calls_counts_as_their_mean(clock: Clock) -> None:
    assert time_call(clock.taking(0.25), CPU, calls=4) == 250.0


def test_a_side_without_memory_does_not_stop_the_others() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nmore")

    timings = time_sides({"full": fails, "snell": lambda: None}, CPU, rounds=3)
    assert list(timings.milliseconds) == ["snell"]
    snell, full = rows_of("case", timings)
    assert (snell.side, snell.rounds, snell.error) == ("snell", 3, None)
    assert (full.side, full.median_ms, full.error) == ("full", None, "out of memory: tried to allocate 9 GiB")


def test_a_side_that_finds_no_memory_in_a_later_round_is_a_row_and_the_others_go_on() -> None:
    ran: list[str] = []

    def fails_later() -> None:
        ran.append("full")
        if len(ran) == 4:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory\nmore")

    timings = time_sides({"full": fails_later, "lora": lambda: None, "snell": lambda: None}, CPU, rounds=4)
    assert {name: len(times) for name, times in timings.milliseconds.items()} == {"lora": 4, "snell": 4}
    rows = {row.side: row for row in rows_of("case", timings)}
    assert (rows["full"].rounds, rows["full"].median_ms) == (0, None)
    assert "out of memory: [enforce fail" in (rows["full"].error or "")
    assert set(rows["snell"].ratios) == {"lora"}


def test_another_error_is_not_out_of_memory() -> None:
    def fails() -> None:
        raise RuntimeError("no such operator")

    with pytest.raises(RuntimeError, match="no such operator"):
        time_sides({"a": fails}, CPU, rounds=3)


def test_ctrl_c_ends_the_rounds_and_keeps_the_complete_ones() -> None:
    ran: list[str] = []

    def interrupts() -> None:
        ran.append("b")
        if len(ran) == 3:
            raise KeyboardInterrupt

    timings = time_sides({"a": lambda: None, "b": interrupts}, CPU, rounds=9, warmup_rounds=1)
    assert timings.interrupted
    assert {name: len(times) for name, times in timings.milliseconds.items()} == {"a": 1, "b": 1}
    assert rows_of("case", timings, notes={"a": "n"})[0].note == "n; interrupted after 1 rounds"
    with pytest.raises(KeyboardInterrupt):
        check_not_interrupted(timings)


def test_ratios_are_formed_round_by_round() -> None:
    samples = {"lora": [1.0, 2.0, 4.0], "snell": [3.0, 2.0, 8.0]}
    rows = {row.side: row for row in rows_of("case", Timings(samples), peaks={"snell": 7}, notes={"lora": "n"})}
    ratio = rows["snell"].ratios["lora"]
    assert ratio["median"] == 2.0  # of 3, 1, 2; the medians' ratio would be 1.5
    assert ratio["p10"] == pytest.approx(np.percentile([3, 1, 2], 10))
    assert ratio["p90"] == pytest.approx(np.percentile([3, 1, 2], 90))
    assert rows["lora"].ratios == {}  # ours is nobody's base
    assert (rows["snell"].median_ms, rows["snell"].peak_bytes, rows["lora"].note) == (3.0, 7, "n")
