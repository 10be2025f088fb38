"""Adapters on diffusers models: added, trained by a run, merged; read again by plain peft and diffusers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_pipelines import FLUX, SD3, UNET, make_pipeline
from torch import Tensor, nn

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.diffusers.adapters import load_adapter, save_adapter
from snell_scale.models.diffusers.config import DiffusersConfig
from snell_scale.tuners import SnellaConfig, SnellConfig
from snell_scale.tuners.methods.base import MethodConfig
from snell_scale.tuners.methods.peft_methods import (
    LoraMethodConfig,
    PeftTuner,
    SnellaMethodConfig,
    SnellMethodConfig,
)

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.0.proj", "ff.net.2"]
PROMPT = "a photo of a red cat"


def new_config(method: str) -> Any:
    if method == "lora":
        return LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    if method == "snella":
        return SnellaConfig(
            r=4, init_sparsity=0.2, target_sparsity=0.5, total_ticks=2, target_modules=TARGETS, init_weights=False
        )
    return SnellConfig(r=4, sparsity=0.5, target_modules=TARGETS, init_weights=False)


methods = pytest.mark.parametrize("method", ["snell", "snella", "lora"])


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET).eval()


def predict(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return unet(noisy, torch.tensor([10, 900]), text).sample


def adapter_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters() if "snell_" in name or "lora_" in name]


def factor_names(module: nn.Module) -> list[str]:
    """Without SNELLA's scalars, whose gradients a single step may round away."""
    return [name for name in adapter_names(module) if re.search("snell_[AB]|lora_[AB]", name)]


def train_a_step(unet: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters as they were before it."""
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    predict(unet.train()).square().mean().backward()
    optimizer.step()
    unet.eval()
    return before


@methods
def test_add_train_disable_enable_delete(method: str) -> None:
    unet = make_unet()
    base = predict(unet)
    unet.requires_grad_(False)
    unet.add_adapter(new_config(method))
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == set(adapter_names(unet))
    before = train_a_step(unet)
    changed = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    assert set(factor_names(unet)) <= changed <= set(adapter_names(unet))
    adapted = predict(unet)
    assert not torch.allclose(adapted, base, atol=1e-3)
    unet.disable_adapters()
    assert torch.equal(predict(unet), base)
    unet.enable_adapters()
    assert torch.equal(predict(unet), adapted)
    unet.add_adapter(new_config(method), "second")
    assert unet.active_adapters() == ["second"]
    assert not torch.equal(predict(unet), adapted)
    unet.delete_adapters("second")
    unet.set_adapter("default")
    assert torch.equal(predict(unet), adapted)


@methods
def test_what_is_saved_is_read_by_peft_by_diffusers_and_by_hand(method: str, tmp_path: Path) -> None:
    unet = make_unet()
    unet.add_adapter(new_config(method))
    train_a_step(unet)
    expected = predict(unet)
    save_adapter(unet, tmp_path)
    assert not torch.allclose(predict(make_unet()), expected, atol=1e-3)
    assert torch.equal(predict(PeftModel.from_pretrained(make_unet(), str(tmp_path))), expected)
    mine = make_unet()
    load_adapter(mine, tmp_path)
    assert torch.equal(predict(mine), expected)
    parameters = dict(mine.named_parameters())
    assert not any(parameters[name].requires_grad for name in adapter_names(mine))
    by_hand = make_unet()
    by_hand.add_adapter(PeftConfig.from_pretrained(str(tmp_path)))
    state = load_file(tmp_path / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    set_peft_model_state_dict(by_hand, state)
    assert torch.equal(predict(by_hand), expected)


@methods
def test_an_adapter_that_was_loaded_to_train_trains_on(method: str, tmp_path: Path) -> None:
    unet = make_unet()
    unet.add_adapter(new_config(method), "mine")
    save_adapter(unet, tmp_path, adapter_name="mine")
    loaded = make_unet()
    load_adapter(loaded, tmp_path, adapter_name="yours", is_trainable=True)
    before = train_a_step(loaded)
    changed = {name for name, p in loaded.named_parameters() if not torch.equal(p, before[name])}
    assert set(factor_names(loaded)) <= changed
    assert all(".yours" in name for name in factor_names(loaded))


def test_what_is_no_adapter_of_the_model_is_refused(tmp_path: Path) -> None:
    unet = make_unet()
    with pytest.raises(ValueError, match="has no adapter 'default', it has none"):
        save_adapter(unet, tmp_path)
    with pytest.raises(ValueError, match="has no adapter_config.json and no adapter_model.safetensors"):
        load_adapter(unet, tmp_path)
    unet.add_adapter(new_config("snell"))
    save_adapter(unet, tmp_path)
    save_adapter(unet, tmp_path / "whole")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.strange.snell_A"] = tensors.pop(min(tensors))
    save_file(tensors, weights)
    other = make_unet()
    with pytest.raises(ValueError, match=r"1 missing: .*; 1 unexpected: strange\.snell_A"):
        load_adapter(other, tmp_path)
    assert torch.equal(predict(other), predict(make_unet()))
    narrow = UNet2DConditionModel(**{**UNET, "cross_attention_dim": 8})
    with pytest.raises(ValueError, match=r"of another shape: .*attn2.*the model that it was trained on"):
        load_adapter(narrow, tmp_path / "whole")
    assert not adapter_names(narrow)
    settings = tmp_path / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"SNELL"', '"SNAIL"'))
    with pytest.raises(ValueError, match="does not know the method 'SNAIL'.*import snell_scale.tuners first"):
        load_adapter(make_unet(), tmp_path)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        load_adapter(make_unet(), tmp_path)


@methods
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_transformers_take_adapters_in_the_same_way(method: str, kind: str, tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return SD3Transformer2DModel(**SD3).eval() if kind == "sd3" else FluxTransformer2DModel(**FLUX).eval()

    config = new_config(method)
    config.target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    model = make()
    model.add_adapter(config)
    save_adapter(model, tmp_path)
    loaded = make()
    load_adapter(loaded, tmp_path)
    expected = dict(model.named_parameters())
    assert factor_names(model)
    assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())


# --- a run's own folder, and pipelines ---

RUN_METHODS: dict[str, MethodConfig] = {
    "snell": SnellMethodConfig(r=4, sparsity=0.5, scale=5.0),
    "snella": SnellaMethodConfig(r=4, init_sparsity=0.2, target_sparsity=0.5, scale=5.0),
    "lora": LoraMethodConfig(r=4),
}


def images(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        PROMPT, height=16, width=16, num_inference_steps=2, generator=generator, output_type="pt"
    ).images


def run_adapter(folder: Path, method: str, destination: Path) -> PeftTuner:
    """What a run does with a pipeline's folder: build, apply, one step, save."""
    half = (0.5, 0.5, 0.5)
    bundle: ModelBundle = DiffusersConfig(folder=str(folder)).build(
        num_classes=0, input_spec=InputSpec(3, 16, 16, half, half), seed=0
    )
    tuner = RUN_METHODS[method].apply(bundle, total_steps=2, steps_per_epoch=1, seed=0)
    assert isinstance(tuner, PeftTuner)
    with torch.no_grad():
        for name, parameter in tuner.module.named_parameters():
            if parameter.requires_grad and ("snell_A" in name or "snell_B" in name or "lora_B" in name):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    tensors = {**dict(tuner.module.named_parameters()), **dict(tuner.module.named_buffers())}
    tuner.save(destination, {name: tensors[name].detach() for name in tuner.saved_names()})
    return tuner


@pytest.mark.parametrize(
    "method", ["snell", *(pytest.param(name, marks=pytest.mark.slow) for name in ("snella", "lora"))]
)
def test_a_runs_adapter_and_its_merged_weights_work_in_a_pipeline(method: str, tmp_path: Path) -> None:
    pipeline: Any = make_pipeline("sd", tmp_path)
    folder, adapter, merged = tmp_path / "pipeline", tmp_path / "adapter", tmp_path / "merged"
    plain = images(pipeline)
    tuner = run_adapter(folder, method, adapter)
    assert all(name.startswith("base_model.model.") for name in load_file(adapter / "adapter_model.safetensors"))

    def fresh() -> Any:
        loaded = DiffusionPipeline.from_pretrained(folder)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    through_peft = fresh()
    through_peft.unet = PeftModel.from_pretrained(through_peft.unet, str(adapter)).eval()
    expected = images(through_peft)
    assert (expected - plain).abs().max() > 1e-3
    added = fresh()
    load_adapter(added.unet, adapter)
    assert torch.equal(images(added), expected)

    peft_model: Any = tuner.module
    peft_model.merge_and_unload().save_pretrained(merged)
    reloaded = UNet2DConditionModel.from_pretrained(merged)
    assert isinstance(reloaded, UNet2DConditionModel)
    assert reloaded.state_dict().keys() == pipeline.unet.state_dict().keys()
    by_part = DiffusionPipeline.from_pretrained(folder, unet=reloaded)
    by_part.set_progress_bar_config(disable=True)
    # One more rounding of the weights, and two steps of the sampler on it.
    torch.testing.assert_close(images(by_part), expected, rtol=1e-3, atol=1e-4)
    by_part.save_pretrained(tmp_path / "whole")
    whole = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    whole.set_progress_bar_config(disable=True)
    assert torch.equal(images(whole), images(by_part))
