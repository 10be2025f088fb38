"""AdamW with decay groups, the learning-rate schedule and averaged weights, as the published recipes use them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from snell_scale.config import TrainingConfig

GROUP_NAMES = ("decayed", "undecayed")


def make_optimizer(module: nn.Module, training: TrainingConfig, *, no_decay: frozenset[str]) -> torch.optim.AdamW:
    """AdamW over the trainable parameters in two named groups.

    Biases, norms (every parameter of at most one dimension) and the names in `no_decay` are not decayed, as
    in the authors' code (github.com/ssfgunner/SNELL @ e9d5185) and timm.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUP_NAMES}
    for name, parameter in trainable_parameters(module):
        exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in no_decay
        groups["undecayed" if exempt else "decayed"].append(parameter)
    settings = [
        {
            "params": groups[name],
            "group_name": name,
            "weight_decay": training.weight_decay if name == "decayed" else 0.0,
        }
        for name in GROUP_NAMES
        if groups[name]
    ]
    fused = all(p.device.type in ("cpu", "cuda") for parameters in groups.values() for p in parameters)
    return torch.optim.AdamW(settings, lr=training.lr, betas=training.betas, fused=fused)


def trainable_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every parameter that requires a gradient."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """The learning rate of optimizer step `step` (0-based): a linear warm-up, then a cosine to min_lr."""
    warmup_steps = round(training.warmup_fraction * total_steps)
    if step < warmup_steps:
        return training.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return training.min_lr + (training.lr - training.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class AveragedWeights:
    """Exponential moving average of the trainable parameters, swapped in for evaluation and saving.

    Laid out as the parameters: where an engine shards these, each rank averages its shard.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(trainable_parameters(module))
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self._parameters.items():
            self._averages[name].lerp_(parameter, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the live weights; calling it again restores both."""
        for name, parameter in self._parameters.items():
            live = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(live)

    def tensors(self) -> dict[str, Tensor]:
        """By parameter name, live: a checkpoint is read into these very tensors."""
        return self._averages
