"""What the implementations of the op are handed: a delta, and the gradients of its factors as they are summed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KERNEL_PARAMETERS: dict[str, tuple[str, ...]] = {
    "distance": (),
    "mixk": ("alpha", "gamma", "beta"),
    "linear": (),
    "sigmoid": ("alpha", "gamma", "beta"),
    "rbf": ("alpha", "gamma", "beta"),
    "exponential": ("alpha", "gamma", "beta"),
}
WEIGHTINGS = ("magnitude", "soft", "hard")


@dataclass(frozen=True)
class Delta:
    """ΔW (out, in) but for its thresholds: G matrices (rows, columns) stacked along out.

    A: (G, H, columns, q), B: (G, H, rows, q), both contiguous and in the dtype of K; params: the kernel's
    parameters, (G,) each, in the same dtype and in the order of KERNEL_PARAMETERS. `is_dense`: ΔW = K, no
    threshold and no factor g.
    """

    A: Tensor
    B: Tensor
    params: Sequence[Tensor]
    kernel: str
    weighting: str
    scale: float
    is_dense: bool
    column_step: int = 1  # ranges of columns begin at its multiples: kh·kw of a convolution

    @property
    def num_groups(self) -> int:
        return self.A.shape[0]

    @property
    def num_components(self) -> int:
        return self.A.shape[1]

    @property
    def num_columns(self) -> int:
        return self.A.shape[2]

    @property
    def num_rows(self) -> int:
        """Of one group; the delta has num_groups times as many."""
        return self.B.shape[2]

    @property
    def num_entries(self) -> int:
        """Of one group: what a threshold is chosen from."""
        return self.num_rows * self.num_columns


@dataclass(frozen=True)
class Wanted:
    """The gradients that somebody will look at."""

    A: bool = False
    B: bool = False
    params: tuple[bool, ...] = ()

    @property
    def factors(self) -> tuple[bool, bool]:
        return self.A, self.B

    @property
    def anything(self) -> bool:
        return self.A or self.B or any(self.params)


@dataclass(frozen=True)
class FactorGradients:
    """Gradients of A, B and the kernel's parameters, summed over ranges of columns; None where not asked for.

    In the dtype of K and the shapes of Delta. A range of columns writes its part of A and adds to all others.
    """

    A: Tensor | None
    B: Tensor | None
    params: Sequence[Tensor | None]

    @classmethod
    def zeros(cls, delta: Delta, wanted: Sequence[bool]) -> "FactorGradients":
        """`wanted`: for A, B and each parameter, in this order."""
        all_of_them = (delta.A, delta.B, *delta.params)
        dA, dB, *dparams = (
            torch.zeros_like(each) if is_wanted else None
            for each, is_wanted in zip(all_of_them, wanted, strict=True)
        )
        return cls(dA, dB, dparams)

    @property
    def is_empty(self) -> bool:
        return all(each is None for each in (self.A, self.B, *self.params))
