"""Small segmentation models of several families, and what tests do with them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.segmentation.config import TimmSegmentationConfig

NUM_CLASSES = 3
TINY: dict[str, Any] = {"embed_dim": 24, "depth": 5, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
SMALL_SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
NARROW: dict[str, dict[str, Any]] = {
    "linear": {},
    "setr_pup": {"channels": 8, "dropout": 0.0},
    "upernet": {"channels": 8, "dropout": 0.0},
}
NUM_AUXILIARY = {"linear": 0, "setr_pup": 3, "upernet": 1}
PLAIN = [("vision_transformer", TINY, 16, decoder) for decoder in NARROW]
FAMILIES = [
    *PLAIN,
    ("swin_tiny_patch4_window7_224", SMALL_SWIN, 64, "linear"),
    ("swin_tiny_patch4_window7_224", SMALL_SWIN, 64, "upernet"),
    ("test_convnext", {}, 64, "linear"),
    ("test_convnext", {}, 64, "upernet"),
    ("test_resnet", {}, 64, "linear"),
    ("test_resnet", {}, 64, "upernet"),
    ("eva02_tiny_patch14_224", {"depth": 4}, 56, "upernet"),
    ("vit_small_patch14_reg4_dinov2", {"depth": 2}, 56, "linear"),
]
family = pytest.mark.parametrize(
    ("architecture", "arguments", "side", "decoder"), FAMILIES, ids=[f"{case[0]}-{case[3]}" for case in FAMILIES]
)


def spec(side: int, width: int | None = None) -> InputSpec:
    return InputSpec(3, side, width or side, (0.5,) * 3, (0.5,) * 3)


def build(
    architecture: str = "vision_transformer",
    *,
    side: int = 16,
    width: int | None = None,
    seed: int = 0,
    **keys: Any,
) -> ModelBundle:
    if architecture == "vision_transformer":
        keys = {"arguments": TINY, **keys}
    config = TimmSegmentationConfig.model_validate({"architecture": architecture, **keys})
    return config.build(num_classes=NUM_CLASSES, input_spec=spec(side, width), seed=seed)


def images(number: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


def logits_of(module: nn.Module, image: Tensor) -> list[Tensor]:
    """The logits, and those of the auxiliary heads."""
    output = module(image)
    return [output[0], *output[1]] if isinstance(output, tuple) else [output]


def loss_of(module: nn.Module, image: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, NUM_CLASSES, (len(image), *image.shape[-2:]), generator=generator)
    losses = [nn.functional.cross_entropy(logits, mask) for logits in logits_of(module, image)]
    return torch.stack(losses).sum()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
