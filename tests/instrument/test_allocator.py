"""The allocator's counters on a pretended GPU, and the host's memory of this very process."""

import mmap
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from snell_scale.instrument.allocator import AllocatorMeter
from snell_scale.instrument.host import host_memory
from snell_scale.instrument.memory import MemoryProbe
from tests.instrument.memory_cases import make_mlp

CUDA = torch.device("cuda", 0)


class Allocator:
    """Three counters with their peaks, and how often memory did not suffice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = {"reserved_bytes": 0, "allocated_bytes": 0, "inactive_split_bytes": 0}
        self.peak = dict(self.current)
        self.num_resets = 0
        self.counters = {"num_alloc_retries": 2, "num_ooms": 1}  # of an earlier attempt in this process
        monkeypatch.setattr(torch.cuda, "memory_stats", self.stats)
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", self.nested)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def hold(self, reserved: int, allocated: int, inactive: int) -> None:
        self.current = {
            "reserved_bytes": reserved,
            "allocated_bytes": allocated,
            "inactive_split_bytes": inactive,
        }
        self.peak = {name: max(self.peak[name], value) for name, value in self.current.items()}

    def stats(self, device: torch.device) -> dict[str, int]:
        assert device == CUDA
        peaks = {f"{name}.all.peak": value for name, value in self.peak.items()}
        return {**peaks, **self.counters}

    def nested(self, device: torch.device) -> dict[str, Any]:
        assert device == CUDA
        return {name: {"all": {"current": value}} for name, value in self.current.items()}

    def reset(self, device: torch.device) -> None:
        assert device == CUDA
        self.peak = dict(self.current)
        self.num_resets += 1


def test_peaks_survive_a_reset_and_reserved_is_followed_step_by_step(monkeypatch: pytest.MonkeyPatch):
    allocator = Allocator(monkeypatch)
    allocator.hold(9000, 9000, 9000)
    allocator.hold(0, 0, 0)
    meter = AllocatorMeter(CUDA)
    allocator.counters = {"num_alloc_retries": 5, "num_ooms": 2}
    for reserved in range(100, 200):
        allocator.hold(10 * reserved, 5 * reserved, reserved)
        meter.observe()
    allocator.hold(4000, 1000, 2500)  # between two steps: an evaluation
    allocator.hold(1500, 500, 50)
    meter.reset_peaks()
    assert allocator.num_resets == 2
    allocator.hold(3000, 1600, 60)
    assert meter.report() == {
        "accelerator_memory_max": 4000,
        "accelerator_memory_reserved_avg": 1495,
        "accelerator_memory_reserved_99th": 1980,
        "allocated_peak_bytes": 1600,
        "inactive_split_peak_bytes": 2500,
        "fragmentation": 1 - 1600 / 4000,
        "num_alloc_retries": 3,
        "num_ooms": 1,
    }
    meter.observe()  # a report in between leaves it as it was
    assert (meter.report() or {})["accelerator_memory_max"] == 4000


def test_an_evaluation_raises_no_peak_but_what_it_leaves_reserved(monkeypatch: pytest.MonkeyPatch):
    allocator = Allocator(monkeypatch)
    meter = AllocatorMeter(CUDA)
    allocator.hold(2000, 1800, 100)
    allocator.hold(2000, 500, 0)
    with meter.leaving_out():
        allocator.hold(9000, 8000, 700)
        allocator.hold(3000, 500, 0)  # it keeps a cache
    report = meter.report() or {}
    assert report["allocated_peak_bytes"] == 1800
    assert report["inactive_split_peak_bytes"] == 100
    assert report["accelerator_memory_max"] == 3000


def test_before_the_first_step_there_is_no_average(monkeypatch: pytest.MonkeyPatch):
    Allocator(monkeypatch)
    report = AllocatorMeter(CUDA).report() or {}
    assert report["accelerator_memory_reserved_avg"] is None
    assert report["accelerator_memory_reserved_99th"] is None
    assert report["fragmentation"] == 0.0


def test_a_phase_of_the_probe_starts_the_peaks_anew_and_loses_none(monkeypatch: pytest.MonkeyPatch):
    allocator, probe = Allocator(monkeypatch), MemoryProbe(make_mlp())
    probe.allocator = AllocatorMeter(CUDA)
    allocator.hold(9000, 8000, 0)
    allocator.hold(1000, 900, 0)
    with probe, probe.phase("forward"):
        assert allocator.peak["allocated_bytes"] == 900
    assert probe.report()["allocator"]["allocated_peak_bytes"] == 8000


def test_without_a_cuda_allocator_it_is_none():
    meter = AllocatorMeter(torch.device("cpu"))
    meter.observe()
    meter.reset_peaks()
    assert meter.report() is None
    assert MemoryProbe(make_mlp()).report()["allocator"] is None


def test_the_hosts_memory_is_this_processs():
    size = 64 * 2**20
    before = host_memory()
    # Pages of its own: malloc could give resident ones back that an earlier test has freed.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1
        during = host_memory()
        # 10 %: the two are read one after the other.
        assert during["rss_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert during["rss_bytes"] is not None
    assert before["rss_bytes"] is not None
    assert 60 * 2**20 < during["rss_bytes"] - before["rss_bytes"] < 80 * 2**20
    assert (during["peak_rss_bytes"] or 0) >= during["rss_bytes"]


def test_where_there_is_no_proc_another_way_is_found(tmp_path: Path):
    found = host_memory(tmp_path / "status")
    assert found["rss_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert found["peak_rss_bytes"] is None
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert host_memory(tmp_path / "status") == {"rss_bytes": 2**20, "peak_rss_bytes": 2**21}
