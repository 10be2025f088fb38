"""x Wᵀ and dy W in float32 on CPU, by the faster of torch's two libraries.

F.linear calls MKL, which leaves the AVX-512 units of AMD processors idle. oneDNN uses them, and a convolution
with a window of one pixel is the same product: twice as fast there, in the same arithmetic. Nothing of this is
particular to the merge op: for a comparison with layers that call F.linear, SNELL_SCALE_CPU_PRODUCTS=mkl takes it
away.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_is_switched_off = False


def has_faster_product(rows: Tensor) -> bool:
    """Whether `product` and `product_backward` should take the place of F.linear's for these rows."""
    is_served = rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.numel() > 0
    return is_served and not _is_switched_off and torch.backends.mkldnn.enabled and _prefers_onednn()


@contextlib.contextmanager
def only_mkl() -> Iterator[None]:
    """F.linear's product for every call inside, forward or backward: to compare like with like."""
    global _is_switched_off
    before, _is_switched_off = _is_switched_off, True
    try:
        yield
    finally:
        _is_switched_off = before


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows (T, in) weightᵀ + bias, (T, out), of weight (out, in)."""
    y = F.conv2d(_as_image(rows.contiguous()), weight[:, :, None, None], bias)
    return _as_rows(y)


def product_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (T, out) weight, (T, in), of weight (out, in)."""
    return product(dy, weight.T, None)


def _as_image(rows: Tensor) -> Tensor:
    """(T, features) → (1, features, T, 1) in channels-last order, the same memory."""
    return rows.view(1, rows.shape[0], 1, rows.shape[1]).permute(0, 3, 1, 2)


def _as_rows(image: Tensor) -> Tensor:
    """(1, features, T, 1) → (T, features), the same memory if it is in channels-last order."""
    return image.permute(0, 2, 3, 1).reshape(image.shape[2], image.shape[1]).contiguous()


@functools.cache
def _prefers_onednn() -> bool:
    choice = os.environ.get("SNELL_SCALE_CPU_PRODUCTS", "auto")
    if choice not in ("auto", "mkl", "onednn"):
        raise ValueError(f"SNELL_SCALE_CPU_PRODUCTS is {choice!r}; expected auto, mkl or onednn")
    if choice != "auto":
        return choice == "onednn"
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_made_by_amd()


def _is_made_by_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # no Linux: then MKL, as without this file
        return False
