"""StepTimer on a clock that the tests turn, and on stand-ins for CUDA events that count synchronisations."""

from collections.abc import Iterable

import pytest
import torch

from snell_scale.instrument.throughput import StepTimer


class Clock:
    """Seconds, moved on by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(timer: StepTimer, clock: Clock, steps: Iterable[tuple[float, int, bool]]) -> None:
    for seconds, num_images, timed in steps:
        clock.now_s += 1000.0
        with timer.waiting_for_data():
            clock.now_s += seconds / 4
        timer.start()
        clock.now_s += seconds
        timer.stop(num_images, timed=timed)


def make_timer(num_warmup_steps: int) -> tuple[StepTimer, Clock]:
    clock = Clock()
    return StepTimer(torch.device("cpu"), num_warmup_steps, num_devices=2, clock=clock), clock


def test_medians_and_percentiles_over_the_timed_steps_only():
    timer, clock = make_timer(2)
    warmup = [(50.0, 8, True), (40.0, 8, False)]
    # 8 images in 0.5, 0.6, … 1.5 s: of eleven values the percentiles are values themselves.
    typical = [(0.5 + 0.1 * i, 8, True) for i in range(11)]
    run(timer, clock, [*warmup, *typical[:4], (30.0, 8, False), *typical[4:]])
    report = timer.report()
    assert report["num_timed_steps"] == 11
    # 1e-9: the clock adds tenths to thousands, which double precision rounds.
    assert report["images_per_s"] == pytest.approx(8 / 1.0, rel=1e-9)
    assert report["images_per_s_p10"] == pytest.approx(8 / 1.4, rel=1e-9)
    assert report["images_per_s_p90"] == pytest.approx(8 / 0.6, rel=1e-9)
    assert report["step_ms_median"] == pytest.approx(1000.0, rel=1e-9)
    assert report["images_per_s_per_device"] == pytest.approx(4 / 1.0, rel=1e-9)
    assert report["step_ms_p10"] == pytest.approx(600.0, rel=1e-9)
    assert report["step_ms_p90"] == pytest.approx(1400.0, rel=1e-9)
    assert report["step_ms_p99"] == pytest.approx(1490.0, rel=1e-9)  # between the last two
    assert report["data_wait_ms_median"] == pytest.approx(250.0, rel=1e-9)
    assert report["data_wait_percent"] == pytest.approx(20.0, rel=1e-9)


def test_a_wait_counts_for_the_step_that_follows_it_only():
    timer, clock = make_timer(0)
    run(timer, clock, [(1.0, 8, True)])
    timer.start()
    clock.now_s += 1.0
    timer.stop(8)
    report = timer.report()
    assert report["data_wait_ms_median"] == pytest.approx((250.0 + 0.0) / 2, rel=1e-9)
    assert report["data_wait_percent"] == pytest.approx(100 * 0.25 / 2.25, rel=1e-9)


def test_each_step_counts_with_its_own_images():
    timer, clock = make_timer(0)
    run(timer, clock, [(1.0, 8, True), (1.0, 2, True), (1.0, 6, True)])
    assert timer.report()["images_per_s"] == 6.0


@pytest.mark.parametrize("steps", [[], [(1.0, 8, True)], [(1.0, 8, True), (1.0, 8, False)]])
def test_without_a_timed_step_every_figure_is_none(steps: list[tuple[float, int, bool]]):
    timer, clock = make_timer(1)
    run(timer, clock, steps)
    assert timer.report() == {
        "images_per_s": None,
        "images_per_s_p10": None,
        "images_per_s_p90": None,
        "images_per_s_per_device": None,
        "step_ms_median": None,
        "step_ms_p10": None,
        "step_ms_p90": None,
        "step_ms_p99": None,
        "data_wait_ms_median": None,
        "data_wait_percent": None,
        "num_timed_steps": 0,
    }


def test_a_report_in_between_changes_nothing():
    timer, clock = make_timer(0)
    run(timer, clock, [(1.0, 4, True)])
    assert timer.report() == timer.report()
    run(timer, clock, [(2.0, 4, True)])
    assert timer.report()["num_timed_steps"] == 2


def test_misuse_is_named():
    with pytest.raises(ValueError, match="num_warmup_steps"):
        StepTimer(torch.device("cpu"), -1)
    timer, _ = make_timer(0)
    with pytest.raises(ValueError, match="without start"):
        timer.stop(8)
    timer.start()
    with pytest.raises(ValueError, match="twice"):
        timer.start()


class Device:
    """A pretended GPU: work is queued, and finishes only when somebody synchronises."""

    def __init__(self) -> None:
        self.queued_ms = 0.0
        self.num_synchronizations = 0

    def synchronize(self, _: torch.device) -> None:
        self.num_synchronizations += 1


def test_cuda_is_synchronised_at_window_edges_only(monkeypatch: pytest.MonkeyPatch):
    device = Device()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "the current stream"
            self.at_ms = device.queued_ms
            self.recorded_after = device.num_synchronizations

        def query(self) -> bool:
            return device.num_synchronizations > self.recorded_after

        def elapsed_time(self, end: "Event") -> float:
            return end.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the current stream")
    timer = StepTimer(torch.device("cuda", 0), 1)

    def step(milliseconds: float, *, timed: bool = True) -> int:
        timer.start()
        device.queued_ms += milliseconds
        timer.stop(10, timed=timed)
        return device.num_synchronizations

    assert [step(900), step(10), step(20), step(30)] == [0, 1, 1, 1]
    assert step(500, timed=False) == 2
    assert [step(40), step(50)] == [3, 3]
    report = timer.report()
    assert device.num_synchronizations == 4
    assert report["num_timed_steps"] == 5
    assert report["step_ms_median"] == pytest.approx(30.0, rel=1e-12)  # one division and one product
    assert report["images_per_s"] == pytest.approx(10 / 0.030, rel=1e-12)
