"""What every registered model family must do: a true bundle, weights from the seed, adapters that train."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from snell_scale.interfaces import InputSpec, ModelBundle, Preprocessing
from snell_scale.registry import config_class, names
from snell_scale.tuners.snell import SnellLayer

GRAY = InputSpec(1, 8, 8, (0.3,), (0.4,))
COLOUR = InputSpec(3, 32, 32, (0.5,) * 3, (0.5,) * 3)
_VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
_UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [16, 16], "norm_num_groups": 4,
    "layers_per_block": 1, "cross_attention_dim": 8, "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip

# One small config per registered family, with an input that suits it; a new registry line needs one here.
SAMPLES: dict[str, tuple[dict[str, Any], InputSpec]] = {
    "timm": ({"architecture": "vision_transformer", "arguments": _VIT}, GRAY),
    "timm_segmentation": ({"architecture": "vision_transformer", "arguments": _VIT, "decoder": "linear"}, GRAY),
    "open_clip": ({"architecture": "custom", "arguments": _CLIP}, COLOUR),
    "diffusers": (
        {
            "architecture": "unet",
            "arguments": _UNET,
            "encoders": "words",
            "scheduler": {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000},
        },
        InputSpec(1, 8, 8, (0.5,), (0.5,)),
    ),
}


def _image_and_text(bundle: ModelBundle, module: Any, image: Tensor) -> list[Tensor]:
    text = torch.tensor([[49406, 320, 49407] + [0] * 9, [49406, 1000, 49407] + [0] * 9])
    image_features, text_features, scale = module(image, text)
    # Features of length 1, to float32 rounding of a norm of 16 numbers.
    for features in (image_features, text_features):
        assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-5)
    assert scale.ndim == 0
    assert module(image, None)[1] is None
    assert module(None, text)[0] is None
    return [image_features, text_features]


def _denoised(bundle: ModelBundle, module: Any, image: Tensor) -> list[Tensor]:
    diffusion = bundle.diffusion
    assert diffusion is not None
    latents = torch.randn(2, *diffusion.latent_shape)
    condition = diffusion.encoders.encode_prompts(["a five", ""])
    found = diffusion.denoise(module, latents, torch.tensor([3, 700]), condition)
    assert found.shape == latents.shape
    return [found]


def _logits(bundle: ModelBundle, module: Any, image: Tensor) -> list[Tensor]:
    logits = module(image)
    assert logits.shape == (2, 5)
    return [logits]


def _pixel_logits(bundle: ModelBundle, module: Any, image: Tensor) -> list[Tensor]:
    module.eval()
    logits = module(image)
    assert logits.shape == (2, 5, *image.shape[2:])
    return [logits]


FORWARDS: dict[str, Callable[[ModelBundle, Any, Tensor], list[Tensor]]] = {
    "class_logits": _logits,
    "pixel_logits": _pixel_logits,
    "image_text_features": _image_and_text,
    "denoised": _denoised,
}


@pytest.fixture(params=names("model"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, *, seed: int = 0) -> tuple[Any, ModelBundle]:
    settings, spec = SAMPLES[name]
    config = config_class("model", name).model_validate({"name": name, **settings})
    return config, config.build(num_classes=5, input_spec=spec, seed=seed)


def outputs(name: str, bundle: ModelBundle, module: Any) -> list[Tensor]:
    spec = SAMPLES[name][1]
    torch.manual_seed(0)
    return FORWARDS[bundle.output](bundle, module, torch.randn(2, spec.channels, spec.height, spec.width))


def test_the_bundle_describes_its_module(name: str) -> None:
    config, bundle = build(name)
    assert outputs(name, bundle, bundle.module)
    modules = dict(bundle.module.named_modules())
    parameters = dict(bundle.module.named_parameters())
    assert {*bundle.wrap_points, *bundle.head_modules} <= modules.keys()
    assert {*bundle.extra_trainable, *bundle.no_decay} <= parameters.keys()
    assert bundle.wrap_points
    assert {"all", "linear"} <= bundle.target_groups.keys()
    for pattern in bundle.target_groups.values():
        matched = [n for n in modules if re.fullmatch(pattern, n)]
        assert matched
        assert not any(n == head or n.startswith(f"{head}.") for n in matched for head in bundle.head_modules)
    assert isinstance(config.describe(), str)
    assert isinstance(config.preprocessing(), Preprocessing)
    assert all(p.requires_grad for p in parameters.values())


def test_the_seed_alone_decides_the_initial_weights(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(name, seed=5)[1].module.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (build(name, seed=seed)[1].module.state_dict() for seed in (5, 6))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("group", ["all", "linear"])
def test_every_adapter_of_every_target_gets_a_gradient(name: str, group: str) -> None:
    bundle = build(name)[1]
    method = config_class("method", "snell").model_validate(
        {"name": "snell", "r": 2, "sparsity": 0.5, "targets": group, "scale": 1.0}
    )
    tuner = method.apply(bundle, total_steps=1, steps_per_epoch=1, seed=0)
    layers = {n: m for n, m in tuner.module.named_modules() if isinstance(m, SnellLayer)}
    wanted = [n for n, _ in bundle.module.named_modules() if re.fullmatch(bundle.target_groups[group], n)]
    assert len(layers) == len(wanted)
    # Weighted, for the features of a CLIP have length 1: their sum of squares would be constant.
    found = outputs(name, bundle, tuner.module)
    weights = [torch.linspace(-1, 1, value.numel()).view_as(value) for value in found]
    torch.stack([(weight * value).sum() for weight, value in zip(weights, found, strict=True)]).sum().backward()
    without = [
        f"{n}.{factor}"
        for n, layer in layers.items()
        for factor, container in (("A", layer.snell_A), ("B", layer.snell_B))
        if container["default"].grad is None or not container["default"].grad.any()
    ]
    assert without == []
