"""What `bench step` trains: a model with random weights, synthetic data, and the loss between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.timm.config import TimmConfig

TARGETS = "linear"
_NUM_CLASSES = 100


@dataclass(frozen=True)
class Workload:
    """`batch`: tensors whose first dimension counts samples; `loss` makes a 0-d float32 tensor of both."""

    name: str
    bundle: ModelBundle
    batch: Mapping[str, Tensor]
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def timm_workload(
    model: str, device: torch.device, *, batch_size: int, dtype: torch.dtype, seed: int
) -> Workload:
    """Classification of noise. ValueError, with close names, where timm does not know the model."""
    config = TimmConfig(architecture=model)
    config.check()
    import timm

    found = timm.get_pretrained_cfg(model)
    size = (found.input_size if found is not None else None) or (3, 224, 224)
    spec = _spec(*size)
    with device:
        bundle = config.build(num_classes=_NUM_CLASSES, input_spec=spec, seed=seed)
    if TARGETS not in bundle.target_groups:
        raise ValueError(
            f"--model is {model!r}, which has no linear layer besides its head; choose a transformer"
        )
    bundle.module.to(dtype)
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.randn((batch_size, *size), generator=generator, device=device).to(dtype)
    labels = torch.randint(_NUM_CLASSES, (batch_size,), generator=generator, device=device)
    return Workload(f"{model} batch {batch_size}", bundle, {"images": images, "labels": labels}, _classify)


def _classify(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch["images"]).float(), batch["labels"])


def _spec(channels: int, height: int, width: int) -> InputSpec:
    middle = (0.5,) * channels
    return InputSpec(channels=channels, height=height, width=width, mean=middle, std=middle)
