"""What the NVIDIA driver itself reports, through nvidia-ml-py; None wherever there is no driver to ask."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


def used_bytes(device: torch.device) -> int | None:
    """Memory in use on a CUDA device, by all processes together; None without a driver or nvidia-ml-py.

    The device is found by its UUID: NVML numbers the devices of the machine, CUDA those it was shown.
    """

    def ask(pynvml: Any) -> int:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).used)

    return _ask_driver(ask)


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without a driver or nvidia-ml-py."""
    return _ask_driver(lambda pynvml: str(pynvml.nvmlSystemGetDriverVersion()))


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
