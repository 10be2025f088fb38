"""A diffusion model small enough for a test: a few weights, encoders without weights, any scheduler."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from snell_scale.interfaces import Diffusion, InputSpec, ModelBundle
from snell_scale.registry import config_class
from snell_scale.tasks.feature_backends import FeatureBackendConfig
from tests.conftest import TINY

V_PREDICTION: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": True,
    "timestep_spacing": "trailing",
}


class PlainEncoders:
    """Pixels are latents, halved in size if asked for; a prompt becomes its length and its first letter."""

    def __init__(self, *, std: float = 0.0, factor: int = 1, fingerprint: str = "plain") -> None:
        self.fingerprint = fingerprint
        self.calls: list[str] = []
        self.weights: Tensor | None = None
        self._std = std
        self._factor = factor

    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        self.weights = torch.zeros(1000)
        self.calls.append(f"images {len(images)}")
        mean = torch.nn.functional.avg_pool2d(images, self._factor)
        return {"mean": mean, "std": torch.full_like(mean, self._std)}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.weights = torch.zeros(1000)
        self.calls.append(f"prompts {len(prompts)}")
        rows = [[len(prompt) / 10, ord((prompt or " ")[-1]) / 128] for prompt in prompts]
        return {"words": torch.tensor(rows)}

    def decode(self, latents: Tensor) -> Tensor:
        self.weights = torch.zeros(1000)
        return latents.repeat_interleave(self._factor, 2).repeat_interleave(self._factor, 3).clamp(-1, 1)

    def to(self, device: Any) -> None:
        return None

    def release(self) -> None:
        self.weights = None


class TinyDenoiser(nn.Module):
    """Two convolutions, told the time and the prompt by a bias."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, 8, 3, padding=1)
        self.told = nn.Linear(3, 8)
        self.outer = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, noisy: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        told = self.told(torch.cat([timesteps.float().unsqueeze(1) / 100, words], dim=1))
        return self.outer(torch.tanh(self.inner(noisy) + told[:, :, None, None]))


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    return model(noisy, timesteps, condition["words"])


def tiny_bundle(
    input_spec: InputSpec, *, scheduler: Mapping[str, Any] = V_PREDICTION, encoders: PlainEncoders | None = None
) -> ModelBundle:
    torch.manual_seed(0)
    channels, height, width = input_spec.channels, input_spec.height, input_spec.width
    return ModelBundle(
        module=TinyDenoiser(channels),
        wrap_points=(),
        target_groups={"all": "inner|outer"},
        fused_groups={},
        head_modules=(),
        input_spec=input_spec,
        output="denoised",
        diffusion=Diffusion(dict(scheduler), encoders or PlainEncoders(), (channels, height, width), denoise),
    )


def latent_batch(number: int, *, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> dict[str, Tensor]:
    """A batch as `LatentSplit` gives it."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, number, *shape, generator=generator)
    return {
        "latents": latents,
        "noise": noise,
        "fraction": torch.rand(number, generator=generator),
        "weight": torch.ones(number),
        "prompt": torch.zeros(number, dtype=torch.int64),
        "index": torch.arange(number),
        "condition.words": torch.rand(number, 2, generator=generator),
    }


def untrained_classifier(folder: Path) -> FeatureBackendConfig:
    """An untrained timm classifier of three digits, as a run leaves it."""
    file = folder / "classifier.yaml"
    data = {**TINY["data"], "captions": ["a {}"]}
    file.write_text(yaml.safe_dump({**TINY, "data": data, "method": {"name": "full"}, "variants": {}}))
    model = config_class("model", "timm").model_validate(TINY["model"])
    bundle = model.build(num_classes=3, input_spec=InputSpec(1, 8, 8, (0.3,), (0.4,)), seed=0)
    save_file(bundle.module.state_dict(), folder / "trained.safetensors")
    return FeatureBackendConfig(name="classifier", config=str(file), weights=str(folder / "trained.safetensors"))
