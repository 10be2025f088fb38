"""What each of two processes sees of a segmentation model in training, written to a file for the assertions."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_scale.engines.ddp import DdpConfig
from snell_scale.engines.deepspeed_config import DeepSpeedConfig
from snell_scale.engines.fsdp2 import Fsdp2Config
from snell_scale.interfaces import Engine, InputSpec, Ranks, StepPlan
from snell_scale.models.activation_checkpointing import checkpoint_activations
from snell_scale.models.segmentation.config import TimmSegmentationConfig
from snell_scale.registry import config_class
from tests.engines.fsdp2_cases import make_optimizer
from tests.spawned import WORLD_SIZE, set_rank

DECODERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "setr_pup": {"channels": 8},
    "upernet": {"channels": 8, "dropout": 0.0},
}
METHODS: dict[str, dict[str, Any]] = {"full": {}, "snell": {"r": 4, "sparsity": 0.5, "scale": 1.0}}
ENGINES: dict[str, Callable[..., Any]] = {"ddp": DdpConfig, "fsdp2": Fsdp2Config, "deepspeed": DeepSpeedConfig}
_BATCH_SIZE, _SIDE, _NUM_CLASSES, _NUM_STEPS = 8, 16, 3, 4


def run(rank: int, ports: Sequence[int], folder: Path) -> None:
    """One process after another engine's: {(engine, decoder, method): losses} in rank<n>.pt."""
    told = {}
    for (name, engine_config), port in zip(ENGINES.items(), ports, strict=True):
        set_rank(rank, WORLD_SIZE, port)
        stage = {"zero_stage": 3} if name == "deepspeed" else {}
        config = engine_config(device="cpu", cpu_threads=1, timeout_seconds=240, **stage)
        joined: AbstractContextManager[Ranks] = config.join()
        with joined as ranks:
            for decoder in DECODERS:
                for method in METHODS:
                    told[name, decoder, method] = losses(config.build(ranks), decoder, method)
    torch.save(told, folder / f"rank{rank}.pt")


def losses(engine: Engine, decoder: str, method: str) -> list[float]:
    """Of some steps with checkpointed blocks, on batches that the ranks share."""
    arguments = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
    config = TimmSegmentationConfig.model_validate(
        {"architecture": "vision_transformer", "arguments": arguments, "decoder": decoder, **DECODERS[decoder]}
    )
    spec = InputSpec(3, _SIDE, _SIDE, (0.5,) * 3, (0.5,) * 3)
    bundle = config.build(num_classes=_NUM_CLASSES, input_spec=spec, seed=0)
    settings = {"name": method, "train_extra": True, **METHODS[method]}
    tuner = config_class("method", method)(**settings).apply(
        bundle, total_steps=_NUM_STEPS, steps_per_epoch=1, seed=0
    )
    checkpoint_activations(bundle.module, bundle.wrap_points)
    blocks = [bundle.module.get_submodule(name) for name in bundle.wrap_points]
    share = _BATCH_SIZE // engine.ranks.world_size
    plan = StepPlan(microbatch_size=share, gradient_accumulation=1, clip_grad_norm=None)
    forward = engine.setup(tuner.module, make_optimizer, blocks=blocks, plan=plan)
    tuner.bind(engine)
    told = []
    for step in range(_NUM_STEPS):
        tuner.begin_step(step, step, True)
        with engine.microbatch(is_last=True):
            with engine.autocast():
                loss = _loss(forward, step, slice(engine.ranks.rank * share, (engine.ranks.rank + 1) * share))
            engine.backward(loss)
        told.append(engine.mean(loss.detach()).item())
        engine.step()
        tuner.end_step()
        engine.zero_grad()
    return told


def _loss(forward: nn.Module, step: int, own: slice) -> Tensor:
    """With the same images at every step, so that it falls."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(_BATCH_SIZE, 3, _SIDE, _SIDE, generator=generator)[own]
    mask = (image.mean(1) > 0).long() + (image[:, 0] > 1)
    output = forward(image)
    logits, auxiliary = output if isinstance(output, tuple) else (output, ())
    parts = [nn.functional.cross_entropy(each, mask) for each in (logits, *auxiliary)]
    return parts[0] + 0.4 * torch.stack([*parts[1:], torch.zeros(())]).sum()
