"""The driver's own count, of the right device: on a pretended machine, and where there is no driver to ask."""

import sys
import types
from typing import Any

import pytest
import torch

from snell_scale.instrument import nvml
from snell_scale.instrument.memory import MemoryProbe
from tests.instrument.memory_cases import make_mlp


class NVMLError(Exception):
    pass


class NotFound(NVMLError):
    pass


class NotSupported(NVMLError):
    pass


def fail(*_: Any) -> None:
    raise NVMLError


class Machine:
    """Three GPUs in the order of their slots; the last is divided into two MIG instances, numbered with gaps."""

    used = {"GPU-a": 10, "GPU-b": 20, "GPU-c": 30, "MIG-c1": 31, "MIG-c3": 33}
    instances = {1: "MIG-c1", 3: "MIG-c3"}

    def __init__(self) -> None:
        self.num_open = 0

    def module(self, **changes: Any) -> types.ModuleType:
        module = types.ModuleType("pynvml")
        module.__dict__.update(
            NVMLError=NVMLError,
            NVMLError_NotFound=NotFound,
            NVMLError_NotSupported=NotSupported,
            NVML_DEVICE_MIG_ENABLE=1,
            nvmlInit=self.open,
            nvmlShutdown=self.close,
            nvmlDeviceGetHandleByUUID=self.by_uuid,
            nvmlDeviceGetMigMode=self.mig_mode,
            nvmlDeviceGetMaxMigDeviceCount=lambda _: 7,
            nvmlDeviceGetMigDeviceHandleByIndex=self.instance,
            nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=self.used[handle]),
            nvmlSystemGetDriverVersion=lambda: "575.1",
        )
        module.__dict__.update(changes)
        return module

    def open(self) -> None:
        self.num_open += 1

    def close(self) -> None:
        self.num_open -= 1

    def by_uuid(self, uuid: str) -> str:
        if uuid not in self.used:
            raise NotFound
        return uuid

    def mig_mode(self, handle: str) -> list[int]:
        if handle == "GPU-a":
            raise NotSupported
        return [int(handle == "GPU-c"), 0]

    def instance(self, handle: str, index: int) -> str:
        assert handle == "GPU-c"
        if index not in self.instances:
            raise NotFound
        return self.instances[index]


def used(
    monkeypatch: pytest.MonkeyPatch, pynvml: types.ModuleType | None, visible: str | None, index: int, uuid: str
) -> int | None:
    """Asked in a process that sees these devices, of which CUDA gives number `index` this UUID."""
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def properties(device: torch.device) -> types.SimpleNamespace:
        assert device.index == index
        return types.SimpleNamespace(uuid=uuid)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return nvml.used_bytes(torch.device("cuda", index))


@pytest.mark.parametrize(
    ("visible", "index", "uuid", "expected"),
    [
        (None, 0, "a", 10),
        ("1,0", 0, "b", 20),
        ("1,0", 1, "a", 10),
        ("0", 0, "b", 20),  # CUDA's first is its fastest, not that of the first slot
        ("GPU-b,GPU-a", 1, "a", 10),
        ("MIG-c3", 0, "c", 33),
        ("MIG-c3, MIG-c1", 1, "c", 31),
        (None, 0, "c", 31),  # unnamed, CUDA shows the first instance
        ("2", 0, "c", 31),
        (None, 0, "c3", 33),  # where CUDA gives the instance's own UUID
        (None, 0, "unknown", None),
        ("MIG-gone", 0, "c", None),
    ],
)
def test_the_device_that_cuda_shows_is_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, uuid: str, expected: int | None
):
    machine = Machine()
    assert used(monkeypatch, machine.module(), visible, index, uuid) == expected
    assert machine.num_open == 0


def test_the_current_device_is_meant_where_no_number_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", Machine().module())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-c1,MIG-c3")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert nvml.used_bytes(torch.device("cuda")) == 33


@pytest.mark.parametrize(
    "pynvml",
    [None, Machine().module(nvmlInit=fail), Machine().module(nvmlDeviceGetMemoryInfo=fail)],
    ids=["no package", "no driver", "no permission"],
)
def test_without_package_or_driver_it_is_none(pynvml: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch):
    assert used(monkeypatch, pynvml, None, 0, "a") is None


def test_the_driver_says_its_version_if_there_is_one(monkeypatch: pytest.MonkeyPatch):
    machine = Machine()
    monkeypatch.setitem(sys.modules, "pynvml", machine.module())
    assert nvml.driver_version() == "575.1"
    monkeypatch.setitem(sys.modules, "pynvml", machine.module(nvmlSystemGetDriverVersion=fail))
    assert nvml.driver_version() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.driver_version() is None
    assert machine.num_open == 0


def test_a_measurement_goes_on_without_a_driver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 4096)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="a"))
    probe = MemoryProbe(make_mlp())
    probe.device = torch.device("cuda", 0)
    entry = probe._entry(probe._ledger.live, peak=True)
    assert entry["nvml_used_bytes"] is None
    assert entry["allocated_bytes"] == 4096
