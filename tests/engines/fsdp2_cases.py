"""Trainings small enough for a test, to be run by any engine on any number of ranks."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_scale import registry
from snell_scale.interfaces import Batch, Engine, InputSpec, ModelBundle, StepPlan, Tuner
from snell_scale.models.activation_checkpointing import checkpoint_activations
from snell_scale.models.timm.config import TimmConfig

NUM_STEPS = 5
STEPS = range(NUM_STEPS)
BATCH_SIZE = 8
_NUM_CLASSES = 3
_SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"r": 4},
    "snell": {"r": 4, "sparsity": 0.5, "scale": 1.0},
    "snella": {"r": 4, "init_sparsity": 0.0, "target_sparsity": 0.6, "scale": 1.0, "tick": "step"},
}


@dataclass(frozen=True)
class Case:
    """masked: a hook lets only some entries of one matrix train. averages: evaluates averaged weights midway."""

    method: str
    clip_grad_norm: float | None = None
    gradient_accumulation: int = 1
    checkpoints_activations: bool = False
    masked: bool = False
    averages: bool = False


CASES = {
    **{
        f"{method} clipped, accumulated": Case(method, clip_grad_norm=0.5, gradient_accumulation=2)
        for method in _SETTINGS
    },
    "snell checkpointed": Case("snell", checkpoints_activations=True),
    "full masked": Case("full", masked=True, gradient_accumulation=2),
    "lora averaged": Case("lora", averages=True),
}


def make_tuner(method: str) -> tuple[ModelBundle, Tuner]:
    """A vision transformer of two blocks with the method applied, the same at every call."""
    spec = InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
    arguments = {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
    config = TimmConfig(architecture="vision_transformer", arguments=arguments)
    bundle = config.build(num_classes=_NUM_CLASSES, input_spec=spec, seed=0)
    settings = {"name": method, **_SETTINGS[method]}
    tuner = registry.config_class("method", method)(**settings).apply(
        bundle, total_steps=NUM_STEPS, steps_per_epoch=1, seed=0
    )
    return bundle, tuner


def set_up(engine: Engine, case: Case) -> tuple[Tuner, nn.Module]:
    """(the tuner bound to the engine, what a step calls)"""
    bundle, tuner = make_tuner(case.method)
    if case.checkpoints_activations:
        checkpoint_activations(bundle.module, bundle.wrap_points)
    blocks = [bundle.module.get_submodule(name) for name in bundle.wrap_points]
    plan = StepPlan(
        microbatch_size=BATCH_SIZE // case.gradient_accumulation // engine.ranks.world_size,
        gradient_accumulation=case.gradient_accumulation,
        clip_grad_norm=case.clip_grad_norm,
    )
    forward = engine.setup(tuner.module, make_optimizer, blocks=blocks, plan=plan)
    tuner.bind(engine)
    return tuner, forward


def train(
    engine: Engine, case: Case, *, steps: range = STEPS, resume: Path | None = None, save: Path | None = None
) -> dict[str, Any]:
    """What every step told (losses, norms) and where training ended, with each frozen gradient ever seen."""
    tuner, forward = set_up(engine, case)
    if resume is not None:
        engine.load(resume, tuner.sharded_state())
    if case.masked:
        mask_gradients(engine, tuner.module)
    averages = [p.detach().clone() for p in tuner.module.parameters() if p.requires_grad]
    told: dict[str, Any] = {"losses": [], "norms": [], "evaluations": [], "frozen_gradients": []}
    for step in steps:
        tuner.begin_step(step, step, True)
        loss, norms = optimizer_step(engine, forward, case, step)
        told["frozen_gradients"] += _frozen_gradients(tuner.module)
        tuner.end_step()
        engine.zero_grad()
        told["losses"].append(loss.item())
        told["norms"].append(norms.tolist())
        if case.averages:
            told["evaluations"].append(_evaluate_averages(engine, tuner.module, averages))
    if save is not None:
        engine.writer(tuner.sharded_state(), staged=True)(save, engine.ranks)
    trained = [name for name, p in tuner.module.named_parameters() if p.requires_grad]
    return {**told, "trained": engine.gather(trained), "sparsities": _sparsities(tuner.module)}


def make_optimizer(module: nn.Module) -> torch.optim.AdamW:
    """Fused, as the runs have it. With the usual eps, rounding decides on the sign of the smallest updates."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "group_name": "decayed", "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "group_name": "undecayed", "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2, eps=1e-3, fused=True)


def optimizer_step(engine: Engine, forward: nn.Module, case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Forward, backward and update; the ranks share each microbatch equally."""
    rank, world_size = engine.ranks.rank, engine.ranks.world_size
    losses = []
    images, labels = (part.chunk(case.gradient_accumulation) for part in make_batch(step).values())
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        with engine.microbatch(is_last=index == case.gradient_accumulation - 1):
            with engine.autocast():
                output = forward(image[rank::world_size])
                loss = nn.functional.cross_entropy(output, label[rank::world_size])
                loss = loss / case.gradient_accumulation
            engine.backward(loss)
        losses.append(loss.detach())
    return engine.mean(torch.stack(losses).sum()), engine.step()


def train_batch_norm(engine: Engine) -> dict[str, Tensor]:
    """The running statistics of a batch norm that trains, after a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, _NUM_CLASSES))
    plan = StepPlan(
        microbatch_size=BATCH_SIZE // engine.ranks.world_size, gradient_accumulation=1, clip_grad_norm=None
    )
    forward = engine.setup(model, make_optimizer, blocks=[model[0]], plan=plan)
    optimizer_step(engine, forward, Case("full"), 0)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    image = torch.randn(BATCH_SIZE, 1, 8, 8, generator=generator)
    return {"image": image, "label": torch.randint(_NUM_CLASSES, (BATCH_SIZE,), generator=generator)}


def mask_of(parameter: Tensor) -> Tensor:
    """Every third entry, wherever the parts are cut."""
    return (torch.arange(parameter.numel()) % 3 == 0).view(parameter.shape)


def mask_gradients(engine: Engine, module: nn.Module) -> None:
    """As GPS does in `bind`."""
    for name, parameter in module.named_parameters():
        if name.endswith("fc1.weight"):
            mask = engine.place(mask_of(parameter), parameter)
            engine.edit_gradient(parameter, partial(_apply_mask, mask=mask))


@torch.no_grad()
def _apply_mask(gradient: Tensor, *, mask: Tensor) -> None:
    gradient.mul_(mask)


@torch.no_grad()
def _evaluate_averages(engine: Engine, module: nn.Module, averages: list[Tensor]) -> float:
    """The loss of the averaged weights, which stand in for the trained ones meanwhile."""
    trained = [p for p in module.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trained]
    for average, parameter in zip(averages, trained, strict=True):
        average.lerp_(parameter, 0.1)
        parameter.copy_(average)
    batch = make_batch(NUM_STEPS)
    loss = nn.functional.cross_entropy(module(batch["image"]), batch["label"])
    for parameter, live in zip([p for p in module.parameters() if p.requires_grad], kept, strict=True):
        parameter.copy_(live)
    return loss.item()


def _frozen_gradients(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if not p.requires_grad and p.grad is not None]


def _sparsities(module: nn.Module) -> dict[str, list[float]]:
    return {name: b.tolist() for name, b in module.named_buffers() if "sparsity" in name}
