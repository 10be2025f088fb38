"""The arithmetic the op insists on: no autocast inside it, no TF32 or bf16 in products of float32 factors."""

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """The op chooses its dtypes itself; autocast would round the factors' products."""
    device_type = device.type
    # Device types without autocast (meta) raise already when asked whether it is on.
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        yield


@contextlib.contextmanager
def ieee_float32_products() -> Iterator[None]:
    """float32 products in float32, whatever the program chose for speed; its choice is put back afterwards.

    A distance is the root of a small difference of large numbers: TF32's 10 mantissa bits would be felt in K.
    Inside torch.compile it does nothing: a graph cannot change the program's settings.
    """
    if torch.compiler.is_compiling():
        yield
        return
    mkldnn_products = getattr(torch.backends.mkldnn, "matmul", None)
    if mkldnn_products is None or not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        with _highest_matmul_precision():
            yield
        return
    backends = (torch.backends.cuda.matmul, mkldnn_products)
    chosen = [(backend, backend.fp32_precision) for backend in backends]
    lowered = [(backend, precision) for backend, precision in chosen if precision not in ("ieee", "none")]
    try:
        for backend, _ in lowered:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision


@contextlib.contextmanager
def _highest_matmul_precision() -> Iterator[None]:
    chosen = torch.get_float32_matmul_precision()
    if chosen == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def host_number(tensor: torch.Tensor, *, without_values: float) -> float:
    """What a tensor of one number holds; of a fake one, which has a shape and no values, `without_values`."""
    return without_values if isinstance(tensor, FakeTensor) else float(tensor)


def factor_dtype(factor: torch.Tensor) -> torch.dtype:
    """The dtype of K, τ and ΔW: the factors' own, at least float32."""
    return torch.promote_types(factor.dtype, torch.float32)
