"""Denoisers without a pipeline, of every architecture: what they tell of themselves, and what a mistake says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from pydantic import ValidationError
from safetensors.torch import save_file
from tiny_pipelines import FLOW, FLUX, PIXART, SD3, SDXL_UNET, UNET
from torch import Tensor, nn

from snell_scale.interfaces import Diffusion, InputSpec, ModelBundle
from snell_scale.models.activation_checkpointing import checkpoint_activations
from snell_scale.models.diffusers.config import DiffusersConfig
from snell_scale.models.module_names import pattern_of
from snell_scale.tuners import SnellConfig

NOISE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
PIXELS: dict[str, Any] = {"in_channels": 3, "out_channels": 3}
# One small model of every architecture; adding an architecture means adding one here.
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"architecture": "unet", "arguments": UNET | PIXELS, "scheduler": NOISE},
    "unet of SDXL": {"architecture": "unet", "arguments": SDXL_UNET | PIXELS, "scheduler": NOISE},
    "sd3": {"architecture": "sd3", "arguments": SD3 | PIXELS, "scheduler": FLOW},
    "flux": {"architecture": "flux", "arguments": FLUX | {"in_channels": 12}, "scheduler": FLOW},
    "pixart": {"architecture": "pixart", "arguments": PIXART | {"in_channels": 3}, "scheduler": NOISE},
}
every = pytest.mark.parametrize("name", SMALL)


def config(name: str, **changes: Any) -> DiffusersConfig:
    return DiffusersConfig.model_validate({**SMALL[name], **changes})


def spec(side: int = 8, channels: int = 3) -> InputSpec:
    return InputSpec(channels, side, side, (0.5,) * channels, (0.5,) * channels)


def build(name: str, seed: int = 0, **changes: Any) -> tuple[ModelBundle, Diffusion]:
    bundle = config(name, **changes).build(num_classes=0, input_spec=spec(), seed=seed)
    assert bundle.diffusion is not None
    return bundle, bundle.diffusion


def predict(module: nn.Module, diffusion: Diffusion) -> Tensor:
    condition = diffusion.encoders.encode_prompts(["a red cat", ""])
    noisy = torch.randn(2, *diffusion.latent_shape, generator=torch.Generator().manual_seed(1))
    return diffusion.denoise(module, noisy, torch.tensor([20, 900]), condition)


def adapted_names(module: nn.Module, pattern: str) -> list[str]:
    return [name for name, _ in module.named_modules() if re.fullmatch(pattern, name)]


@every
def test_the_bundle_describes_its_module(name: str) -> None:
    bundle, diffusion = build(name)
    assert predict(bundle.module, diffusion).shape == (2, 3, 8, 8)
    assert (bundle.output, diffusion.latent_shape, bundle.head_modules) == ("denoised", (3, 8, 8), ())
    modules = dict(bundle.module.named_modules())
    assert bundle.wrap_points
    assert set(bundle.wrap_points) <= modules.keys()
    assert not any(a.startswith(f"{b}.") for a in bundle.wrap_points for b in bundle.wrap_points)
    for pattern in bundle.target_groups.values():
        for target in adapted_names(bundle.module, pattern):
            layer = modules[target]
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            assert getattr(layer, "groups", 1) == 1
    assert {"all", "linear", "attention", "mlp"} <= bundle.target_groups.keys()
    assert ("conv" in bundle.target_groups) is ("unet" in name)
    assert ("cross_attention" in bundle.target_groups) is (name not in ("sd3", "flux"))


@every
def test_every_factor_gets_a_gradient_and_nothing_else_does(name: str) -> None:
    bundle, diffusion = build(name)
    settings = SnellConfig(r=4, sparsity=0.5, target_modules=bundle.target_groups["all"], init_weights=False)
    module = get_peft_model(bundle.module, settings)  # pyright: ignore[reportArgumentType]
    predict(module, diffusion).square().mean().backward()
    factors = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert len(factors) == 2 * len(adapted_names(build(name)[0].module, bundle.target_groups["all"]))
    silent = [n for n, grad in factors.items() if grad is None or not grad.abs().sum() > 0]
    assert not silent
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)


@every
def test_all_are_the_layers_that_train_but_the_first_and_the_last(name: str) -> None:
    bundle, diffusion = build(name)
    predict(bundle.module, diffusion).square().mean().backward()
    targets = set(adapted_names(bundle.module, bundle.target_groups["all"]))
    left = {
        layer_name: layer.weight.grad
        for layer_name, layer in bundle.module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer_name not in targets
    }
    unused = {layer_name for layer_name, grad in left.items() if grad is None or not grad.abs().sum() > 0}
    assert unused == ({"transformer_blocks.1.attn.add_q_proj"} if name == "sd3" else set())
    ends = {
        "sd3": {"pos_embed.proj", "proj_out"},
        "pixart": {"pos_embed.proj", "proj_out"},
        "flux": {"x_embedder", "proj_out"},
    }
    assert left.keys() - unused == ends.get(name, {"conv_in", "conv_out"})


@every
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    grads = []
    for checkpointed in (False, True):
        bundle, diffusion = build(name)
        if checkpointed:
            checkpoint_activations(bundle.module, bundle.wrap_points)
        predict(bundle.module, diffusion).square().mean().backward()
        grads.append({n: p.grad for n, p in bundle.module.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@every
def test_the_seed_alone_decides_the_initial_weights(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(name, seed=seed)[0].module.state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@every
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_are_read_from_a_file_of_the_denoiser(name: str, ending: str, tmp_path: Path) -> None:
    state = build(name, seed=7)[0].module.state_dict()
    path = tmp_path / f"weights.{ending}"
    if ending == "bin":
        torch.save(state, path)
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    loaded = build(name, weights=str(path))[0].module.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_file_of_parameters_alone_is_enough(tmp_path: Path) -> None:
    module = build("sd3", seed=7)[0].module
    assert dict(module.named_buffers())
    save_file({name: p.detach() for name, p in module.named_parameters()}, tmp_path / "trained.safetensors")
    loaded = build("sd3", weights=str(tmp_path / "trained.safetensors"))[0].module.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in module.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(build("sd3")[0].module.state_dict(), path)
    with pytest.raises(
        ValueError, match=r"does not fit the model: \d+ missing: .*\d+ unexpected: context_embedder"
    ):
        build("unet", weights=str(path))
    with pytest.raises(ValueError, match="there is no file .*absent.bin"):
        build("unet", weights=str(tmp_path / "absent.bin"))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (spec(channels=1), "have 1 channels.*takes 3 channels"),
        (InputSpec(3, 8, 8, (0.3,) * 3, (0.5,) * 3), r"data.scaling=symmetric"),
        (spec(side=7), "7x7 pixels, expected multiples of 2"),
    ],
)
def test_images_that_the_model_cannot_take_are_refused(image: InputSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config("sd3").build(num_classes=0, input_spec=image, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"arguments": {"block_out_chanels": (8,)}},
            "'block_out_chanels', unknown to UNet2DConditionModel: did you",
        ),
        ({"arguments": UNET | {"norm_num_groups": 5}}, "diffusers refuses to build UNet2DConditionModel"),
        ({"arguments": UNET | {"num_class_embeds": 5}}, "num_class_embeds=5.*conditioned on prompts alone"),
        ({"arguments": UNET | {"cross_attention_dim": (8, 16)}}, "expected one width of the text"),
        ({"scheduler": {"_class_name": "DDPMSheduler"}}, "did you mean 'DDPMScheduler'"),
        (
            {"scheduler": {"beta_shedule": "linear"}},
            "'beta_shedule', unknown to DDPMScheduler: did you mean 'beta_",
        ),
    ],
)
def test_mistakes_in_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("unet", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of folder, architecture and shape, not none"),
        ({"architecture": "unet", "shape": "sd15"}, "exactly one of .* not .'architecture', 'shape'"),
        ({"architecture": "unet"}, "without a noise schedule: give scheduler"),
        ({"folder": "somewhere", "arguments": {"sample_size": 8}}, "a folder's config.json has its own"),
        ({"shape": "sd15", "encoders": "pipeline"}, "encoders=pipeline are those of a folder"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DiffusersConfig.model_validate(settings)


def test_the_label_names_folder_shape_or_arguments() -> None:
    assert DiffusersConfig(folder="models/sd15").describe() == "sd15"
    assert DiffusersConfig(shape="sdxl").describe() == "sdxl"
    small = DiffusersConfig(architecture="unet", arguments={"sample_size": 16}, scheduler=NOISE)
    assert small.describe() == "unet(sample_size=16)"


def test_patterns_mean_exactly_the_names_they_were_made_of() -> None:
    module = nn.ModuleDict(
        {str(i): nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)) for i in range(12)}
    )
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    assert pattern_of(module, linear) == r"\d+\.0|\d+\.2"
    some = [name for name in linear if name != "11.2"]
    assert adapted_names(module, pattern_of(module, some)) == some
