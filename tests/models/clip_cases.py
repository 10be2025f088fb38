"""A CLIP of two small towers, and a training of it that any engine can run on any number of ranks."""

from typing import Any

import torch
from torch import Tensor

from snell_scale import registry
from snell_scale.interfaces import Engine, InputSpec, ModelBundle, StepPlan, Tuner
from snell_scale.models.activation_checkpointing import checkpoint_activations
from snell_scale.models.open_clip.config import OpenClipConfig

SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}
SPEC = InputSpec(channels=3, height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3)
METHODS: dict[str, dict[str, Any]] = {
    "snella": {"r": 4, "init_sparsity": 0.0, "target_sparsity": 0.6, "scale": 1.0, "tick": "step"},
    "snell": {"r": 4, "sparsity": 0.5, "scale": 1.0},
    "klora": {"r": 4, "scale": 1.0},
    "lora": {"r": 4},
    "gps": {},
    "bias": {},
    "full": {},
}
BATCH_SIZE = 4
NUM_STEPS = 4


def small(**settings: Any) -> OpenClipConfig:
    return OpenClipConfig(**{"architecture": "custom", "arguments": SMALL} | settings)


def build(**settings: Any) -> ModelBundle:
    """The small CLIP's bundle; `settings` of its config."""
    return small(**settings).build(num_classes=0, input_spec=SPEC, seed=0)


def tune(bundle: ModelBundle, method: str, **settings: Any) -> Tuner:
    config = registry.config_class("method", method)(name=method, **METHODS.get(method, {}) | settings)
    return config.apply(bundle, total_steps=NUM_STEPS, steps_per_epoch=1, seed=0)


def pairs(step: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 8, 8) and tokens (B, 8) of a step, the same for everyone."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH_SIZE, 3, 8, 8, generator=generator)
    return images, torch.randint(1, 64, (BATCH_SIZE, 8), generator=generator)


def train(engine: Engine, method: str, *, checkpointed: bool = False) -> dict[str, Any]:
    """Losses of some steps, and the trained tensors, whole, on rank 0. The loss is a mean over pairs."""
    bundle = build()
    tuner = tune(bundle, method)
    if checkpointed:
        checkpoint_activations(bundle.module, bundle.wrap_points)
    blocks = [bundle.module.get_submodule(name) for name in bundle.wrap_points]
    rank, world_size = engine.ranks.rank, engine.ranks.world_size
    plan = StepPlan(microbatch_size=BATCH_SIZE // world_size, gradient_accumulation=1, clip_grad_norm=None)
    forward = engine.setup(tuner.module, _optimizer, blocks=blocks, plan=plan)
    tuner.bind(engine)
    losses = []
    for step in range(NUM_STEPS):
        tuner.begin_step(step, step, True)
        images, texts = (part[rank::world_size] for part in pairs(step))
        with engine.microbatch(is_last=True):
            with engine.autocast():
                image, text, scale = forward(images, texts)
                loss = -(scale * image * text).sum(dim=1).mean()
            engine.backward(loss)
        losses.append(engine.mean(loss.detach()).item())
        engine.step()
        tuner.end_step()
        engine.zero_grad()
    trained = [name for name, p in tuner.module.named_parameters() if p.requires_grad]
    return {"losses": losses, "trained": engine.gather(trained)}


def _optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    # With the usual eps, rounding decides on the sign of the smallest updates.
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, fused=True)
