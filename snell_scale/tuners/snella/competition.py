"""Connects the SNELLA layers of any module to the allocator: reads factors and gradients, writes sparsities."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from snell_scale.tuners.snell.layer import SnellLayer
from snell_scale.tuners.snella.allocator import FactorStep, SparsityAllocator
from snell_scale.tuners.snella.config import SnellaConfig

# A ViT-H has 192 matrices, and ticks may be steps: the log stays a few megabytes at most.
_MOST_RECORDED = 200

LastUpdate: TypeAlias = Callable[[nn.Parameter], tuple[Tensor, Tensor | None]]


def own_gradient(parameter: nn.Parameter) -> tuple[Tensor, Tensor | None]:
    """(value, gradient) of a parameter that is whole in this process."""
    return parameter, parameter.grad


class SparsityCompetition:
    """The training side of one SNELLA adapter. SnellaModel has one; after `inject_adapter_in_model`, make one.

    Scores are a pure function of factors and gradients: ranks that hold equal ones allocate equally. Where these
    are sharded, `last_update` gives (value, gradient of the last step) of a factor, both laid out alike.
    """

    def __init__(self, model: nn.Module, config: SnellaConfig, *, adapter_name: str = "default") -> None:
        """Raises ValueError where `config` cannot train or `model` has no SNELLA layer of that adapter."""
        self._adapter_name = adapter_name
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, SnellLayer) and adapter_name in layer.snell_sparsity
        }
        if not self._layers:
            raise ValueError(
                f"no SNELLA layer of an adapter {adapter_name!r} in this model: add the adapter first"
            )
        # Without values, but with the whole shapes: an engine may shard the factors later.
        self._whole = {
            name: tuple(
                torch.empty_like(factor, device="meta", dtype=torch.promote_types(factor.dtype, torch.float32))
                for factor in factors
            )
            for name, factors in self.factors().items()
        }
        matrices = {
            name: (layer.snell_plan[adapter_name].num_groups, layer.matrix_size(adapter_name))
            for name, layer in self._layers.items()
        }
        self._allocator = SparsityAllocator(matrices, config.schedule(), beta1=config.beta1, beta2=config.beta2)

    def factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """The parameters that are scored: layer name → (A, B)."""
        name = self._adapter_name
        return {key: (layer.snell_A[name], layer.snell_B[name]) for key, layer in self._layers.items()}

    def update_scores(self, *, last_update: LastUpdate = own_gradient) -> None:
        """Call after each optimizer.step() and before zero_grad: takes the new factors and the gradients used."""
        steps = {}
        for key, (A, B) in self.factors().items():
            (value_A, dA), (value_B, dB) = last_update(A), last_update(B)
            steps[key] = FactorStep(A=value_A, B=value_B, dA=dA, dB=dB)
        self._allocator.update(steps)

    def start(self, place: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
        """Make the moving averages (those there are stay) now rather than with the first step.

        place: (whole tensor, factor of that shape) → what of it belongs where the factor is kept.
        """
        state = self._allocator.state_dict()
        for key, factors in self.factors().items():
            for factor, whole, parameter in zip("AB", self._whole[key], factors, strict=True):
                for kind in ("importance", "uncertainty"):
                    zeros = torch.zeros_like(whole, device="cpu")
                    state.setdefault(f"{key}.{factor}.{kind}", place(zeros, parameter))
        self._allocator.load_state_dict(state)

    def allocate(self, tick: int) -> dict[str, list[float]] | None:
        """Call at the start of every tick, from 0: sets each matrix's sparsity where the schedule says so.

        Returns layer name → sparsity of each stacked matrix, None where nothing changed.
        """
        if any(layer.merged for layer in self._layers.values()):
            raise ValueError("cannot change sparsities while the adapter is merged: call unmerge_adapter first")
        allocation = self._allocator.allocate(tick)
        for key, shares in (allocation or {}).items():
            sparsity = self._layers[key].snell_sparsity[self._adapter_name]
            sparsity.copy_(torch.tensor(shares, dtype=torch.float64))
        return allocation

    def figures(self, allocation: Mapping[str, Sequence[float]], tick: int) -> dict[str, float]:
        """What `allocate` decided at that tick, for the log: a pure function of both, resumed or not.

        "sparsity" over all matrices, "nonzeros" in number; and at some 200 evenly spaced ticks and the last,
        "sparsity/<layer>/<index>" of every stacked matrix.
        """
        matrices = self._allocator.matrices
        total = sum(count * size for count, size in matrices.values())
        nonzeros = sum(matrices[name][1] * (1 - share) for name, shares in allocation.items() for share in shares)
        figures = {"sparsity": 1 - nonzeros / total, "nonzeros": float(round(nonzeros))}
        schedule = self._allocator.schedule
        allocations = -(-schedule.total_ticks // schedule.mask_interval)
        interval = schedule.mask_interval * -(-allocations // _MOST_RECORDED)
        if tick % interval and tick != schedule.total_ticks - 1:
            return figures
        each = {
            f"sparsity/{name}/{index}": round(share, 6)
            for name, shares in allocation.items()
            for index, share in enumerate(shares)
        }
        return figures | each

    def state_dict(self) -> dict[str, Tensor]:
        """The allocator's moving averages; the sparsities themselves are part of the model's state."""
        return self._allocator.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue as the competition that the state was taken from."""
        self._allocator.load_state_dict(state)
