"""Which of torch's libraries multiplies matrices for the merge op on CPU: told in the rows, and made equal.

On some processors the op's float32 products go to oneDNN while every other side's go through F.linear. Then the
side "snell-mkl" is the very same op by F.linear's library, in the same rounds.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from snell_scale.bench.memory import Phases
from snell_scale.bench.settings import MKL_SIDE, MergeSettings, StepSettings
from snell_scale.kernels.merge import cpu_products

_S = TypeVar("_S", MergeSettings, StepSettings)


def products_of(side: str) -> contextlib.AbstractContextManager[None]:
    """Inside, the products are those of this side, in forward and backward."""
    return cpu_products.only_mkl() if side == MKL_SIDE else contextlib.nullcontext()


def with_products_of(side: str, phases: Phases) -> Phases:
    """The same phases, each inside `products_of(side)`."""
    if side != MKL_SIDE:
        return phases

    def inside(part: Callable[[], object]) -> object:
        with products_of(side):
            return part()

    return replace(phases, parts=tuple((name, partial(inside, part)) for name, part in phases.parts))


def products_note(
    side: str, device: torch.device, *, dtype: torch.dtype, implementation: str = "auto"
) -> str | None:
    """The library of one of our sides, for its row; None where there is no choice: not on CPU, not float32."""
    if not side.startswith("snell") or device.type != "cpu" or dtype != torch.float32:
        return None
    with products_of(side):
        is_onednn = _is_onednn() and implementation != "reference"  # which calls F.linear
    # A torch without MKL takes another BLAS; its F.linear stays what the other sides call.
    fallback = "MKL" if torch.backends.mkl.is_available() else "F.linear's library"
    return f"products by {'oneDNN' if is_onednn else fallback}"


def with_default_sides(settings: _S) -> _S:
    """Add "snell-mkl" behind all others where its products are not those of "snell" anyway."""
    if settings.device != "cpu" or settings.dtype != "float32" or not _is_onednn():
        return settings
    if isinstance(settings, MergeSettings) and settings.implementation == "reference":
        return settings  # it calls F.linear anyway
    return replace(settings, sides=(*settings.sides, MKL_SIDE))


def _is_onednn() -> bool:
    return cpu_products.has_faster_product(torch.ones(1, 1))
