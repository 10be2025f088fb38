"""Made inputs of the merge op, its specification applied to them, and how far two sets of results are apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from snell_scale.kernels.merge.reference import delta_weight_reference

KERNEL_NAMES = ("distance", "mixk", "linear", "sigmoid", "rbf", "exponential")
WEIGHTING_NAMES = ("magnitude", "soft", "hard")

# Away from their start values and from each other, so that an exchange of two would show.
PARAMS = {
    "mixk": {"alpha": 0.8, "gamma": 0.6, "beta": 0.05},
    "sigmoid": {"alpha": 0.9, "gamma": -0.4, "beta": 1.3},
    "rbf": {"alpha": 1.2, "gamma": -0.3, "beta": 0.4},
    "exponential": {"alpha": 0.7, "gamma": -0.2, "beta": 0.6},
}


class Settings(TypedDict):
    """The keywords that the op and its specification share."""

    sparsity: float | list[float] | Tensor | None
    kernel: str
    weighting: str
    scale: float
    kernel_params: Mapping[str, Tensor]


@dataclass
class MergeCase:
    """Everything that one call takes; every tensor but dy requires a gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor
    settings: Settings

    def leaves(self) -> dict[str, Tensor]:
        own = {"x": self.x, "weight": self.weight, "bias": self.bias, "A": self.A, "B": self.B}
        return own | dict(self.settings["kernel_params"])

    def gradients(self, y: Tensor) -> dict[str, Tensor]:
        """y and ∂⟨y, dy⟩ for every leaf that y depends on."""
        named = self.leaves()
        gradients = torch.autograd.grad(y, list(named.values()), self.dy, allow_unused=True)
        return {"y": y.detach()} | {n: g for n, g in zip(named, gradients, strict=True) if g is not None}

    def reference_delta(self) -> Tensor:
        return delta_weight_reference(self.A, self.B, **self.settings)

    def reference(self) -> Tensor:
        return F.linear(self.x, self.weight + self.reference_delta(), self.bias)

    def reference_of_delta_alone(self) -> Tensor:
        return F.linear(self.x, self.reference_delta(), self.bias)


def make_case(
    kernel: str = "distance",
    *,
    weighting: str = "magnitude",
    sparsity: float | list[float] | Tensor | None = 0.6,
    scale: float = 0.7,
    groups: int = 1,
    rows: int = 7,
    num_in: int = 9,
    rank: int = 4,
    components: int = 2,
    num_tokens: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> MergeCase:
    """`groups` stacked matrices of (rows, num_in); x (num_tokens, num_in)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * std
        return values.to(dtype).requires_grad_()

    spread = torch.linspace(1.0, 1.1, groups, dtype=torch.float64)
    params = {n: (v * spread).to(dtype).requires_grad_() for n, v in PARAMS.get(kernel, {}).items()}
    return MergeCase(
        x=normal(num_tokens, num_in),
        weight=normal(groups * rows, num_in),
        bias=normal(groups * rows),
        # Distances near 1 whatever the rank: exp(−D²) neither vanishes nor saturates, which would make ties.
        A=normal(groups, components, num_in, rank // components, std=rank**-0.5),
        B=normal(groups, components, rows, rank // components, std=rank**-0.5),
        dy=normal(num_tokens, groups * rows).detach(),
        settings=Settings(
            sparsity=sparsity, kernel=kernel, weighting=weighting, scale=scale, kernel_params=params
        ),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|; 0 for two empty or two zero tensors."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    apart = (actual.detach().double() - expected.detach().double()).abs().max().item()
    return apart / max(expected.detach().double().abs().max().item(), torch.finfo(torch.float64).tiny)


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float) -> None:
    """The same results, by name, each within `tolerance` of its largest entry."""
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, errors
