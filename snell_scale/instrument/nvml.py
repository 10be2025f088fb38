"""What the NVIDIA driver itself reports, through nvidia-ml-py; None wherever there is no driver to ask."""

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


def used_bytes(device: torch.device) -> int | None:
    """Memory in use on a CUDA device, by all processes together; None without a driver or nvidia-ml-py.

    Of a device that is a MIG instance: in use of that instance.
    """
    return _ask_driver(lambda pynvml: int(pynvml.nvmlDeviceGetMemoryInfo(_handle(pynvml, device)).used))


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without a driver or nvidia-ml-py."""
    return _ask_driver(lambda pynvml: str(pynvml.nvmlSystemGetDriverVersion()))


def _handle(pynvml: Any, device: torch.device) -> Any:
    """NVML's name for the device. NVML numbers the devices of the machine, CUDA those it was shown.

    The numbers in CUDA_VISIBLE_DEVICES are no help: CUDA sorts by speed unless CUDA_DEVICE_ORDER says otherwise.
    So the UUID decides. Of a GPU that is divided, CUDA shows the MIG instances named in CUDA_VISIBLE_DEVICES, or
    without a name the first one.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = shown[index].strip() if index < len(shown) else ""
    if name.startswith("MIG-"):
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        whole = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError_NotFound:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
    return next(_instances(pynvml, whole), whole)


def _instances(pynvml: Any, whole: Any) -> Iterator[Any]:
    """The MIG instances of a GPU, in order; none of one that is not divided, or cannot be."""
    try:
        is_divided = pynvml.nvmlDeviceGetMigMode(whole)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError_NotSupported:
        return
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(whole) if is_divided else 0):
        try:
            yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, index)
        except pynvml.NVMLError_NotFound:  # their numbers have gaps
            continue


def _ask_driver(ask: Callable[[Any], _T]) -> _T | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return ask(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
