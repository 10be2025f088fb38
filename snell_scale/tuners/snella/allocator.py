"""SNELLA's competition between matrices: sensitivity scores of the factors, and how they share the non-zeros.

After every optimizer step, with the new factor θ and the gradient just used (NaN counts as 0):
    I = |θ ⊙ ∇θ|,   Ī ← β₁ Ī + (1 − β₁) I,   U ← β₂ U + (1 − β₂) |I − Ī|
A matrix scores mean(Ī ⊙ U) over its A plus the same over its B. At a tick the budget of non-zeros is shared in
proportion to the scores, no matrix receiving more than its size.

Nothing here knows PEFT: factors come by name, with A of shape (G, H, in, r/H) and B (G, H, out/G, r/H) for the
G matrices stacked in one layer, each of which has its own score and its own share.

Source: SNELLA, arXiv 2510.24037; github.com/ssfgunner/SNELL @ e9d5185 : sparse_allocator.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_EXACT_FLOAT32 = 2**24  # from here on float32 skips integers


@dataclass(frozen=True)
class BudgetSchedule:
    """How many entries may be non-zero at each tick: from `init_sparsity` down a cubic to `target_sparsity`."""

    init_sparsity: float
    target_sparsity: float
    total_ticks: int
    init_warmup: int
    final_warmup: int
    mask_interval: int

    def budget_at(self, tick: int, sizes: Sequence[int]) -> tuple[float, bool]:
        """(budget, whether it is to be shared out anew) for matrices of these sizes at this tick."""
        first = sum((1 - self.init_sparsity) * size for size in sizes)
        last = sum((1 - self.target_sparsity) * size for size in sizes)
        if tick <= self.init_warmup:
            return first, False
        if tick > self.total_ticks - self.final_warmup:
            return last, True
        progress = (tick - self.init_warmup) / (self.total_ticks - self.final_warmup - self.init_warmup)
        budget = math.floor(last + (first - last) * (1 - progress) ** 3)
        return budget, tick % self.mask_interval == 0


class FactorStep(NamedTuple):
    """The factors of one layer after an optimizer step and the gradients that step used (None counts as 0)."""

    A: Tensor
    B: Tensor
    dA: Tensor | None
    dB: Tensor | None


class SparsityAllocator:
    """Keeps the scores of named layers and turns them into one sparsity for each of their matrices."""

    def __init__(
        self, matrices: Mapping[str, tuple[int, int]], schedule: BudgetSchedule, *, beta1: float, beta2: float
    ) -> None:
        """`matrices`: layer name → (number of stacked matrices G, entries of one of them)."""
        self.matrices = dict(matrices)
        self.schedule = schedule
        self.beta1 = beta1
        self.beta2 = beta2
        self._averages: dict[str, Tensor] = {}  # "<layer>.<A|B>.<importance|uncertainty>", shaped as the factor

    @torch.no_grad()
    def update(self, steps: Mapping[str, FactorStep]) -> None:
        """Take in one optimizer step. A pure function of factors and gradients: equal on equal ranks."""
        for name, step in steps.items():
            self._update_factor(f"{name}.A", step.A, step.dA)
            self._update_factor(f"{name}.B", step.B, step.dB)

    def allocate(self, tick: int) -> dict[str, list[float]] | None:
        """Layer name → sparsity of each stacked matrix, or None where this tick leaves them unchanged."""
        sizes = [size for count, size in self.matrices.values() for _ in range(count)]
        budget, due = self.schedule.budget_at(tick, sizes)
        if not due:
            return None
        volumes = iter(share_out(budget, sizes, self.scores()))
        return {
            name: [min(max(1 - next(volumes) / size, 0.0), 1.0) for _ in range(count)]
            for name, (count, size) in self.matrices.items()
        }

    @torch.no_grad()
    def scores(self) -> list[float]:
        """One score per matrix, in the order of `matrices`; 0 before any step. Waits for the device, once."""
        found = [
            self._score(f"{name}.A", group) + self._score(f"{name}.B", group)
            for name, (count, _) in self.matrices.items()
            for group in range(count)
        ]
        return torch.stack([score.to(found[0].device) for score in found]).tolist() if found else []

    def state_dict(self) -> dict[str, Tensor]:
        """The moving averages: plain tensors, so a checkpoint with them loads under `weights_only=True`."""
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved moving averages; raises ValueError where they belong to other layers."""
        kinds = [f"{factor}.{kind}" for factor in "AB" for kind in ("importance", "uncertainty")]
        unknown = sorted(set(state) - {f"{name}.{kind}" for name in self.matrices for kind in kinds})
        if unknown:
            raise ValueError(
                f"the allocator state has {len(unknown)} entries for layers that this model does not adapt "
                f"(first: {unknown[0]!r}; adapted here: {', '.join(list(self.matrices)[:3])}, …); load it into "
                "a model with the same target_modules"
            )
        self._averages = {key: value.detach().clone() for key, value in state.items()}

    def _update_factor(self, key: str, factor: Tensor, gradient: Tensor | None) -> None:
        importance_average = self._average(f"{key}.importance", factor)
        uncertainty_average = self._average(f"{key}.uncertainty", factor)
        if gradient is None:
            importance = torch.zeros_like(importance_average)
        else:
            dtype = importance_average.dtype
            importance = (factor.to(dtype) * gradient.to(dtype)).abs()
            # As the authors do for NaN. An infinity (overflow under loss scaling) would stay in the averages.
            importance = torch.where(importance.isfinite(), importance, torch.zeros_like(importance))
        importance_average.mul_(self.beta1).add_(importance * (1 - self.beta1))
        deviation = (importance - importance_average).abs()
        uncertainty_average.mul_(self.beta2).add_(deviation * (1 - self.beta2))

    def _average(self, key: str, factor: Tensor) -> Tensor:
        average = self._averages.get(key)
        if average is None:
            average = torch.zeros_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32))
        elif average.shape != factor.shape:
            raise ValueError(
                f"the allocator's average {key!r} has shape {tuple(average.shape)} but the factor has "
                f"{tuple(factor.shape)}; load the state into a model with the same rank"
            )
        self._averages[key] = average.to(factor.device)
        return self._averages[key]

    def _score(self, key: str, group: int) -> Tensor:
        importance = self._averages.get(f"{key}.importance")
        if importance is None:
            return torch.zeros(())
        product = importance * self._averages[f"{key}.uncertainty"]
        gather = getattr(product, "full_tensor", None)
        if gather is not None:  # a sharded factor (DTensor) gathers itself: every rank scores the whole
            product = gather()
        return product[group].mean()


def share_out(budget: float, sizes: Sequence[int], scores: Sequence[float]) -> list[int]:
    """Share `budget` entries among matrices of these sizes in proportion to their scores.

    Each gets ⌊budget · score⌋, at most its size; what is left goes to those with room, in proportion to their
    scores, until it is used up; fractions of an entry are dropped at the end, so the sum lies at most one entry
    per matrix below the budget and never above it. Scores that are all zero share equally.

    Below 2²⁴ entries the arithmetic is float32, in the published order of operations: its rounding decides single
    entries, and the published allocations are reproduced to the entry. From there on float64 takes over, for
    float32 cannot count that far. The rounds are bounded: each one but the last few fills a matrix.
    """
    total = sum(sizes)
    if budget >= total:
        return list(sizes)
    dtype = torch.float32 if total < _EXACT_FLOAT32 else torch.float64
    limit = torch.tensor(sizes, dtype=dtype)
    share = _normalised(torch.tensor(scores, dtype=dtype))
    volume = torch.minimum(limit, (budget * share).floor())
    for _ in range(len(sizes) + 8):
        left = budget - volume.sum()
        room = limit - volume
        if left <= 0 or not bool((room > 0).any()):
            break
        weight = torch.where(room > 0, share, torch.zeros_like(share))
        if weight.sum() == 0:  # only matrices of score 0 have room: equally
            weight = (room > 0).to(dtype)
        volume += torch.minimum(left * weight / weight.sum(), room)
    return _trimmed([int(entries) for entries in volume.tolist()], math.ceil(budget))


def _normalised(scores: Tensor) -> Tensor:
    """Scores divided by their sum, equal shares where they are all zero; NaN counts as 0."""
    scores = scores.nan_to_num(nan=0.0, posinf=torch.finfo(scores.dtype).max).clamp(min=0)
    if scores.max() > 1:  # keeps the sum finite
        scores = scores / scores.max()
    if scores.sum() == 0:
        scores = torch.ones_like(scores)
    return scores / scores.sum()


def _trimmed(volumes: list[int], most: int) -> list[int]:
    """Take back, from the largest first, the few entries that rounding gave beyond the budget."""
    excess = sum(volumes) - most
    while excess > 0:
        largest = max(range(len(volumes)), key=volumes.__getitem__)
        taken = min(excess, volumes[largest])
        volumes[largest] -= taken
        excess -= taken
    return volumes
