"""Published shapes on the meta device: parameters, adapted matrices, the largest one, what each method trains."""

import re

import pytest
import torch
from torch import Tensor, nn

from snell_scale.interfaces import ModelBundle
from snell_scale.models.diffusers.config import DiffusersConfig
from snell_scale.models.diffusers.shapes import SHAPES
from snell_scale.tuners.methods.base import MethodConfig
from snell_scale.tuners.methods.peft_methods import LoraMethodConfig, SnellaMethodConfig, SnellMethodConfig
from snell_scale.tuners.methods.plain import FullConfig

# Published numbers of parameters; the counts of adapted matrices are of this package's groups.
PUBLISHED = {
    # shape: (parameters, blocks, adapted matrices, of them convolutions, largest matrix)
    "sd15": (859_520_964, 38, 280, 96, (1280, 2560 * 3 * 3)),
    "sdxl": (2_567_463_684, 87, 792, 49, (1280, 2560 * 3 * 3)),
    "sd3": (2_028_328_000, 24, 338, 0, (9 * 1024, 1536)),
    "flux": (11_901_408_320, 57, 502, 0, (6 * 3072, 3072)),
    "pixart": (611_349_152, 28, 289, 0, (6 * 1152, 1152)),
}


def adapted_names(module: nn.Module, pattern: str) -> list[str]:
    return [name for name, _ in module.named_modules() if re.fullmatch(pattern, name)]


def on_meta(shape: str) -> ModelBundle:
    settings = DiffusersConfig.model_validate({"shape": shape})
    image = settings.preprocessing().image
    assert image is not None
    with torch.device("meta"):
        return settings.build(num_classes=0, input_spec=image, seed=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes_have_their_published_sizes(shape: str) -> None:
    bundle = on_meta(shape)
    parameters, blocks, matrices, convolutions, largest = PUBLISHED[shape]
    assert sum(p.numel() for p in bundle.module.parameters()) == parameters
    assert len(bundle.wrap_points) == blocks
    layers = [
        bundle.module.get_submodule(name) for name in adapted_names(bundle.module, bundle.target_groups["all"])
    ]
    weights = [layer.get_parameter("weight").flatten(1) for layer in layers]
    assert len(weights) == matrices
    assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == convolutions
    assert tuple(max(weights, key=Tensor.numel).shape) == largest
    assert all(p.is_meta for p in bundle.module.parameters())


METHODS: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "lora": LoraMethodConfig(r=8),
    "snell": SnellMethodConfig(r=8, sparsity=0.9),
    "snella": SnellaMethodConfig(r=8, init_sparsity=0.0, target_sparsity=0.9),
}
# Every (m, n) matrix has r·(m + n) numbers in LoRA and SNELL alike; SNELLA adds α, γ and β, three a matrix.
TRAINABLE = {"sd15": 8_439_808, "sdxl": 24_680_448, "sd3": 14_698_496, "flux": 43_321_344, "pixart": 6_886_400}


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        (method, shape)
        if (method, shape) == ("snell", "sd15")
        else pytest.param(method, shape, marks=pytest.mark.slow)
        for method in METHODS
        for shape in SHAPES
    ],
)
def test_trainable_parameters_of_published_shapes(shape: str, method: str) -> None:
    bundle = on_meta(shape)
    parameters, _, matrices, _, _ = PUBLISHED[shape]
    layers = adapted_names(bundle.module, bundle.target_groups["all"])
    sides = [bundle.module.get_submodule(name).get_parameter("weight").flatten(1).shape for name in layers]
    assert 8 * sum(sum(side) for side in sides) == TRAINABLE[shape]
    with torch.device("meta"):
        tuner = METHODS[method].apply(bundle, total_steps=10, steps_per_epoch=5, seed=0)
    more = {"snella": 3 * matrices, "full": parameters - TRAINABLE[shape]}.get(method, 0)
    assert tuner.num_trainable() == TRAINABLE[shape] + more


def test_a_shape_has_no_encoders() -> None:
    diffusion = on_meta("sd15").diffusion
    assert diffusion is not None
    assert diffusion.latent_shape == (4, 64, 64)
    assert diffusion.scheduler["beta_schedule"] == "scaled_linear"
    with pytest.raises(ValueError, match="model.encoders is 'none'"):
        diffusion.encoders.encode_prompts(["a cat"])
