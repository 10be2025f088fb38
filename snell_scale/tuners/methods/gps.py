"""GPS: sparse tuning of the weights with the largest gradients, as published, with dense gradients and moments.

Zhang et al., Gradient-based Parameter Selection, arXiv 2312.10136; github.com/FightingFighting/GPS @ c050245 :
utils/pruning.py, train_gps.py.

In every row (output neuron) of every weight matrix the `per_neuron` entries train whose gradient, summed over the
training data before training, is largest in magnitude. Biases train whole, norms and embeddings (of positions and
of words) not at all; the head trains whole. Gradients are computed densely and masked, and the whole matrix is in
the optimizer: GPS saves parameters on disk, not memory.

Differences: the gradient is the task's own (the published runs take a supervised contrastive loss on two views;
their code has this choice too), the mask is one byte per entry, and frozen tensors are not in the optimizer. Of a
projection that is a bare parameter (CLIP's x W, a neuron in each column) the rows are taken as of any matrix.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from snell_scale.interfaces import Engine, ModelBundle
from snell_scale.tuners.methods.base import MethodConfig, ModuleTuner, always_trained, train_only
from snell_scale.tuners.methods.trained_file import write_trained

_FROZEN_ENDINGS = ("pos_embed", "_token", "_embedding")
_WHOLE = ("bias", "gamma")


class GpsConfig(MethodConfig):
    """GPS: per output neuron, the weights with the largest gradients; dense memory. Ignores r and targets."""

    name: Literal["gps"] = "gps"
    per_neuron: int = Field(default=1, gt=0, description="Weights tuned per output neuron (published: 1 to 5).")

    def apply(self, bundle: ModelBundle, *, total_steps: int, steps_per_epoch: int, seed: int) -> "GpsTuner":
        return GpsTuner(bundle, self)


class GpsTuner(ModuleTuner):
    """Selects once, then masks every gradient as it arrives; see `interfaces.Tuner`."""

    needs_selection = True

    def __init__(self, bundle: ModelBundle, config: GpsConfig) -> None:
        whole, matrices = _roles(bundle, train_extra=config.train_extra)
        train_only(bundle.module, whole | matrices.keys())
        # A masked gradient leaves Adam's update of an entry at exactly 0; weight decay would still move it.
        super().__init__(bundle.module, no_decay=bundle.no_decay | matrices.keys())
        self._config = config
        self._shapes = {name: parameter.shape for name, parameter in matrices.items()}
        self._engine: Engine | None = None
        self._chosen: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}

    def num_trainable(self) -> int:
        unmasked = super().num_trainable() - sum(shape.numel() for shape in self._shapes.values())
        return unmasked + sum(shape[0] * self._count(shape) for shape in self._shapes.values())

    def select(self, losses: Iterator[Tensor], sum_over_ranks: Callable[[list[Tensor]], None]) -> None:
        """Sum the gradients of `losses` and choose the largest in each row. ValueError if all are zero."""
        self.hold_statistics()
        for loss in losses:
            loss.backward()
        parameters = {name: self.module.get_parameter(name) for name in self._shapes}
        # A rank may have had no loss, and some weights may not be used.
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        sum_over_ranks(list(gradients.values()))
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            raise ValueError("GPS selects by gradient, and one is not finite; check data and precision")
        if not any(bool(gradient.any()) for gradient in gradients.values()):
            raise ValueError(
                "GPS selects by gradient, and every gradient is zero: is the head all zeros? Use another head"
            )
        self._chosen = {name: self._largest(gradient).cpu() for name, gradient in gradients.items()}
        for parameter in self.module.parameters():
            parameter.grad = None

    def select_by_shape(self) -> None:
        """The first entries of every row."""
        self._chosen = {
            name: torch.zeros(shape[0] * self._count(shape), dtype=torch.int64)
            for name, shape in self._shapes.items()
        }

    def bind(self, engine: Engine) -> None:
        """Mask every gradient from now on, before it is clipped."""
        self._engine = engine
        for name in self._shapes:
            engine.edit_gradient(self.module.get_parameter(name), partial(self._mask, name))
        if self._chosen:  # a resumed run restores what was selected
            self._place_masks(engine)

    def begin_step(self, step: int, epoch: int, is_epoch_start: bool) -> dict[str, float]:
        assert self._masks, "select() comes before the first step"
        return super().begin_step(step, epoch, is_epoch_start)

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> int:
        settings = self._config.model_dump(mode="json")
        return write_trained(folder, self.module, tensors, method=settings, chosen=self._chosen)

    def tensors(self) -> list[Tensor]:
        return [*self._masks.values(), *self._chosen.values()]

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state.get("chosen", {})) != set(self._shapes):
            raise ValueError(
                "the checkpoint's selection is of other weights than this model's; start the run anew"
            )
        self._chosen = dict(state["chosen"])
        if self._engine is not None:
            self._place_masks(self._engine)

    def _largest(self, gradient: Tensor) -> Tensor:
        """Flat indices, ascending within a row, of the entries of each row with the largest |gradient|."""
        rows = gradient.flatten(1).abs()
        columns = rows.topk(self._count(gradient.shape), dim=1).indices.sort(dim=1).values
        return (columns + torch.arange(len(rows), device=rows.device).unsqueeze(1) * rows.shape[1]).flatten()

    def _count(self, shape: torch.Size) -> int:
        return min(self._config.per_neuron, shape[1:].numel())

    def _place_masks(self, engine: Engine) -> None:
        for name, shape in self._shapes.items():
            mask = torch.zeros(shape.numel(), dtype=torch.bool)
            mask[self._chosen[name]] = True
            self._masks[name] = engine.place(mask.view(shape), self.module.get_parameter(name))

    @torch.no_grad()
    def _mask(self, name: str, gradient: Tensor) -> None:
        gradient.mul_(self._masks[name])


def _roles(bundle: ModelBundle, *, train_extra: bool) -> tuple[set[str], dict[str, nn.Parameter]]:
    """(names trained whole, name → matrix of which some entries train); what is in neither is frozen."""
    parameters = dict(bundle.module.named_parameters())
    modules = dict(bundle.module.named_modules())
    norms = {name for name, child in modules.items() if "norm" in type(child).__name__.lower()}
    lookups = {name for name, child in modules.items() if isinstance(child, nn.Embedding)}
    whole = always_trained(bundle, train_extra=train_extra)
    matrices: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        owner = name.rpartition(".")[0]
        is_left = "norm" in name or owner in norms or owner in lookups or name.endswith(_FROZEN_ENDINGS)
        # What a model itself fixes (a tower that is not to be tuned) stays fixed.
        if name in whole or is_left or not parameter.requires_grad:
            continue
        if any(word in name for word in _WHOLE):
            whole.add(name)
        elif parameter.ndim >= 2:
            matrices[name] = parameter
    return whole, matrices
