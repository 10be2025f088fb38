"""A tiny ViT, every registered method on it, and a few optimizer steps."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snell_scale.config import TrainingConfig
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig
from snell_scale.interfaces import Engine, InputSpec, ModelBundle, StepPlan
from snell_scale.models.timm.config import TimmConfig
from snell_scale.optimization import make_optimizer
from snell_scale.registry import config_class, names

# What each method needs beside r; adding a method to the registry that needs more means adding it here.
SETTINGS: dict[str, dict[str, Any]] = {
    "snell": {"sparsity": 0.5},
    "snella": {"init_sparsity": 0.0, "target_sparsity": 0.8},
}
# Not square in any layer, so that a transposed mask or index would show.
ARGUMENTS = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
METHODS = names("method")


def vit(seed: int = 0) -> ModelBundle:
    config = TimmConfig(architecture="vision_transformer", arguments=ARGUMENTS)
    return config.build(num_classes=3, input_spec=InputSpec(1, 8, 8, (0.3,), (0.4,)), seed=seed)


def convnet(seed: int = 0) -> ModelBundle:
    """A small resnet: convolutions and batch norms."""
    config = TimmConfig(architecture="test_resnet")
    return config.build(num_classes=3, input_spec=InputSpec(3, 32, 32, (0.3,) * 3, (0.4,) * 3), seed=seed)


def method(name: str, **changes: Any) -> Any:
    return config_class("method", name).model_validate(
        {"name": name, "r": 4, **SETTINGS.get(name, {}), **changes}
    )


def apply(name: str, bundle: ModelBundle, *, seed: int = 0, **changes: Any) -> Any:
    return method(name, **changes).apply(bundle, total_steps=40, steps_per_epoch=4, seed=seed)


def batch(bundle: ModelBundle, seed: int = 0) -> tuple[Tensor, Tensor]:
    spec = bundle.input_spec
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, spec.channels, spec.height, spec.width, generator=generator)
    return images, torch.arange(6) % 3


def loss_of(tuner: Any, bundle: ModelBundle, seed: int = 0) -> Tensor:
    images, labels = batch(bundle, seed)
    return torch.nn.functional.cross_entropy(tuner.module(images), labels)


def train(tuner: Any, bundle: ModelBundle, *, steps: int = 3, first: int = 0) -> list[dict[str, float]]:
    """The loop's calls in the loop's order, with weight decay; returns the figures of every step."""
    tuner.module.train()
    if tuner.needs_selection and first == 0:
        select(tuner, (loss_of(tuner, bundle, seed) for seed in range(2)))
    engine = set_up(tuner)
    figures = []
    for step in range(first, first + steps):
        figures.append(tuner.begin_step(step, step // 4, step % 4 == 0))
        engine.backward(loss_of(tuner, bundle, step))
        engine.step()
        tuner.end_step()
        engine.zero_grad()
    return figures


def set_up(tuner: Any) -> Engine:
    """On one CPU."""
    training = TrainingConfig(steps=1, batch_size=6, lr=0.01, weight_decay=0.1)
    engine = SingleConfig(device="cpu").build(Ranks())
    engine.setup(
        tuner.module,
        lambda module: make_optimizer(module, training, no_decay=tuner.no_decay),
        blocks=[],
        plan=StepPlan(microbatch_size=6, gradient_accumulation=1, clip_grad_norm=None),
    )
    tuner.bind(engine)
    return engine


def select(tuner: Any, losses: Iterable[Tensor]) -> None:
    """Selection on one rank: there is nothing to sum."""
    tuner.select(iter(losses), lambda gradients: None)


def save(tuner: Any, folder: Path) -> int:
    """The adapter of a tuner whose tensors are all whole, as here."""
    live = tuner.module.state_dict()
    return tuner.save(folder, {name: live[name] for name in tuner.saved_names()})


@torch.no_grad()
def logits(module: torch.nn.Module, bundle: ModelBundle) -> Tensor:
    module.eval()
    return module(batch(bundle, 99)[0])
