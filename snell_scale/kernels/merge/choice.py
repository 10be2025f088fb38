"""Which implementation computes a call: chosen by device and dtype, said in the log, never changed silently."""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from .numerics import factor_dtype

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_logger = logging.getLogger(__name__)


def choose_implementation(asked: str, A: Tensor, layer_dtype: torch.dtype | None = None) -> str:
    """reference, torch or triton. One asked for by name is used or refused with ValueError.

    auto: triton for float32 factors (or narrower) on CUDA where triton is installed, else torch.
    """
    if asked == "triton":
        _check_triton(A, layer_dtype)
    if asked != "auto":
        return asked
    return "triton" if A.device.type == "cuda" and _triton_obstacle(A, layer_dtype) is None else "torch"


@functools.cache
def say_once(chosen: str, device_type: str, dtype: torch.dtype) -> None:
    """The choice, in the log, at its first use."""
    _logger.info("merge op on %s with %s factors: %s implementation", device_type, dtype, chosen)


def _check_triton(A: Tensor, layer_dtype: torch.dtype | None) -> None:
    obstacle = _triton_obstacle(A, layer_dtype)
    if obstacle is not None:
        raise ValueError(f"implementation='triton' cannot be used: {obstacle}; use 'auto' or 'torch'")


def _triton_obstacle(A: Tensor, layer_dtype: torch.dtype | None) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if factor_dtype(A) != torch.float32:
        return f"its kernels compute in float32 and the factors are {A.dtype}"
    if layer_dtype == torch.float64:
        return "its kernels compute in float32 and x is torch.float64"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if A.device.type not in ("cuda", "meta") and not is_interpreted:
        return f"the factors are on {A.device} (on CPU triton runs only interpreted, with TRITON_INTERPRET=1)"
    return None
