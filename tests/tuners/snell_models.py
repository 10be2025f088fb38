"""Tiny models and configurations that the SNELL tests share."""

from typing import Any

import timm
import torch
from peft import PeftModel
from torch import Tensor, nn

from snell_scale.tuners import SnellaConfig, SnellaModel, SnellConfig, SnellModel
from snell_scale.tuners.snell import SnellLayer

VIT_TARGETS = r".*blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
METHODS = ("snell", "snella")
MODELS = ("vit", "conv")


class ConvNet(nn.Module):
    """Convolutions of every geometry that SNELL takes, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.same = nn.Conv2d(12, 12, (3, 2), padding="same", dilation=(2, 1), bias=False)
        self.reflect = nn.Conv2d(12, 16, 3, padding=(1, 2), padding_mode="reflect")
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.stem, self.same, self.reflect, self.point):
            x = conv(x).relu()
        return self.head(x.mean((2, 3)))


def build(name: str) -> nn.Module:
    """A base model, the same weights each time."""
    torch.manual_seed(0)
    if name == "conv":
        return ConvNet().eval()
    vit = timm.models.VisionTransformer(
        img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, num_classes=5, in_chans=1
    )
    return vit.eval()


def config(method: str, model: str, **changes: Any) -> SnellConfig:
    """An adapter of visible size on every inner layer, with the head trained beside it."""
    settings: dict[str, Any] = {
        "r": 8,
        "target_modules": VIT_TARGETS if model == "vit" else ["stem", "same", "reflect", "point"],
        "modules_to_save": ["head"],
        "init_weights": False,
    }
    settings |= (
        {"init_sparsity": 0.2, "target_sparsity": 0.8, "total_ticks": 4}
        if method == "snella"
        else {"sparsity": 0.9}
    )
    if model == "conv":
        settings["rank_pattern"] = {"stem": 4}
    settings |= changes
    return SnellaConfig(**settings) if method == "snella" else SnellConfig(**settings)


def images(count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def snell_layers(model: nn.Module) -> dict[str, SnellLayer]:
    """The adapted layers by their names in the base model."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, SnellLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


def snell_of(model: PeftModel) -> SnellModel:
    assert isinstance(model.base_model, SnellModel)
    return model.base_model


def snella_of(model: PeftModel) -> SnellaModel:
    assert isinstance(model.base_model, SnellaModel)
    return model.base_model


def train(model: PeftModel, *, ticks: range = range(3), competes: bool = False, lr: float = 1e-2) -> list[float]:
    """Two steps a tick; returns the losses. SNELLA models compete where asked."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=lr)
    x = images(dtype=trainable[0].dtype)
    labels = torch.arange(len(x)) % 5
    losses = []
    for tick in ticks:
        if competes:
            snella_of(model).allocate(tick)
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            if competes:
                snella_of(model).update_scores()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses
