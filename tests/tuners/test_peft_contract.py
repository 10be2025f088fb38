"""What a PEFT user may expect of a method, for SNELL and SNELLA on a ViT and on a convolutional net."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import convert_to_lora
from safetensors.torch import load_file
from snell_models import METHODS, MODELS, VIT_TARGETS, build, config, images, snell_layers, snell_of, train

both = pytest.mark.parametrize("method", METHODS)
everywhere = pytest.mark.parametrize("model_name", MODELS)

# Forward and merge add the same ΔW to W0 and round once; a few ulp of summation order remain.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def peft_model(method: str, model_name: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(2)
    model = get_peft_model(build(model_name).to(dtype), config(method, model_name)).eval()
    assert isinstance(model, PeftModel)
    return model


@both
@everywhere
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_gives_equal_logits(
    method: str, model_name: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = peft_model(method, model_name).train()
    train(model, competes=method == "snella")
    expected = model.eval()(images())
    model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft only warns of missing keys
        loaded = PeftModel.from_pretrained(build(model_name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(images()), expected)
    assert not torch.allclose(build(model_name)(images()), expected, atol=1e-3)
    assert not any(p.requires_grad for p in loaded.parameters())


@both
@everywhere
def test_files(method: str, model_name: str, tmp_path: Path) -> None:
    model = peft_model(method, model_name)
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": method.upper(), "r": 8, "num_components": 2, "scale": 0.1, "weighting": "magnitude"}
    expected |= {"kernel": "mixk" if method == "snella" else "distance", "modules_to_save": ["head"]}
    expected |= (
        {"target_sparsity": 0.8, "beta1": 0.85, "tick": "epoch"} if method == "snella" else {"sparsity": 0.9}
    )
    assert expected.items() <= saved.items()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.rpartition(".")[2] for key in tensors if ".head." not in key}
    factors = {"snell_A", "snell_B"}
    more = {"snell_alpha", "snell_gamma", "snell_beta", "snell_sparsity"} if method == "snella" else set()
    assert kinds == factors | more
    layers = 8 if model_name == "vit" else 4
    assert len(tensors) == layers * len(kinds) + 2  # and the head's weight and bias
    dtypes = {key: t.dtype for key, t in tensors.items() if key.endswith("snell_sparsity")}
    assert set(dtypes.values()) <= {torch.float64}


@both
@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_and_unmerge(method: str, model_name: str, dtype: torch.dtype) -> None:
    model = peft_model(method, model_name, dtype)
    x = images(dtype=dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(model(x), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    for name, p in model.named_parameters():  # (W + δ) − δ rounds twice at the size of W and δ, all below 1
        torch.testing.assert_close(p, before[name], rtol=0, atol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(model(x), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@both
@everywhere
def test_merge_and_unload_leaves_a_plain_model(method: str, model_name: str) -> None:
    model = peft_model(method, model_name)
    expected = model(images())
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(build(model_name))
    assert not any("snell" in name or "base_layer" in name for name, _ in plain.named_modules())
    torch.testing.assert_close(plain(images()), expected, rtol=CLOSE[torch.float32], atol=CLOSE[torch.float32])


@both
def test_merging_refuses_nan_and_keeps_the_weight(method: str) -> None:
    model = peft_model(method, "vit")
    layer = snell_layers(model)["blocks.0.mlp.fc1"]
    before = layer.get_submodule("base_layer").get_parameter("weight").clone()
    with torch.no_grad():
        layer.get_parameter("snell_A.default").fill_(torch.inf)
    for safe_merge in (True, False):
        with pytest.raises(ValueError, match="NaN"):
            layer.merge(safe_merge=safe_merge)
        assert torch.equal(layer.get_submodule("base_layer").get_parameter("weight"), before)
        assert not layer.merged


@both
@everywhere
def test_disabled_and_unloaded_is_the_base(method: str, model_name: str) -> None:
    model = peft_model(method, model_name)
    base, adapted = build(model_name)(images()), model(images())
    with model.disable_adapter():
        assert torch.equal(model(images()), base)
    assert torch.equal(model(images()), adapted)
    model.merge_adapter()
    with model.disable_adapter():  # takes the delta out of the weights first
        torch.testing.assert_close(model(images()), base, rtol=1e-5, atol=1e-5)
    assert torch.equal(peft_model(method, model_name).unload()(images()), base)


@both
@everywhere
def test_several_adapters(method: str, model_name: str, tmp_path: Path) -> None:
    model, x = peft_model(method, model_name), images()
    first = model(x)
    other = config(method, model_name, r=4, rank_pattern={}, kernel="mixk", modules_to_save=None)
    model.add_adapter("other", other)
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    second = model.eval()(x)
    assert not torch.allclose(first, second, atol=1e-3)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.endswith(".other") for name in trainable)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(build(model_name), tmp_path / "other", adapter_name="other")
    assert torch.equal(loaded(x), second)
    loaded.load_adapter(tmp_path, adapter_name="first")
    loaded.set_adapter("first")
    assert torch.equal(loaded(x), first)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    model.set_adapter("default")
    assert torch.equal(model(x), first)


@both
@everywhere
def test_two_active_adapters_add_their_deltas(method: str, model_name: str) -> None:
    model, x = peft_model(method, model_name), images()
    other = config(method, model_name, r=4, rank_pattern={}, modules_to_save=None, dropout=0.5, drop_path=0.5)
    model.add_adapter("other", other)
    model.eval()
    snell_of(model).set_adapter(["default", "other"])
    together = model(x)
    layer = next(iter(snell_layers(model).values()))
    weight = layer.get_submodule("base_layer").get_parameter("weight").clone()
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    model.merge_adapter(adapter_names=["default", "other"])
    merged = layer.get_submodule("base_layer").get_parameter("weight")
    torch.testing.assert_close(merged, weight + delta, rtol=1e-6, atol=1e-6)  # another order of three additions
    torch.testing.assert_close(model(x), together, rtol=1e-4, atol=1e-5)


@both
@everywhere
def test_gradients_reach_the_adapter_and_modules_to_save_only(method: str, model_name: str) -> None:
    model = peft_model(method, model_name).train()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = ".snell_" in name or "modules_to_save.default" in name
        assert parameter.requires_grad is expected, name
        assert (parameter.grad is not None) is expected, name
        if expected:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name
    assert not any(p.requires_grad for p in model.get_submodule("base_model").parameters() if p.grad is None)


@both
@everywhere
def test_deepcopy_is_independent(method: str, model_name: str) -> None:
    model = peft_model(method, model_name)
    expected = model(images())
    copied = copy.deepcopy(model)
    train(copied.train(), competes=method == "snella")
    assert torch.equal(model(images()), expected)
    assert not torch.equal(copied.eval()(images()), expected)


@both
def test_injection_into_a_plain_module(method: str) -> None:
    torch.manual_seed(2)
    settings = config(method, "vit")
    injected = inject_adapter_in_model(settings, build("vit"), low_cpu_mem_usage=False)
    assert type(injected) is type(build("vit"))
    assert torch.equal(injected.eval()(images()), peft_model(method, "vit")(images()))
    half = inject_adapter_in_model(settings, build("vit").to(torch.bfloat16))
    assert {p.dtype for name, p in half.named_parameters() if ".snell_" in name} == {torch.float32}


@both
def test_mixed_batches_are_refused(method: str) -> None:
    model = peft_model(method, "vit")
    with pytest.raises(ValueError, match="set_adapter"):
        model(images(), adapter_names=["default"] * 6)
    with pytest.raises(ValueError, match="set_adapter"):
        model.get_submodule("base_model.model.blocks.0.mlp.fc1")(torch.zeros(1, 32), adapter_names=["default"])


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_half_base_keeps_float32_factors(
    method: str, dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = peft_model(method, "vit", dtype)
    assert {p.dtype for name, p in model.named_parameters() if ".snell_" in name} == {torch.float32}
    y = model(images(dtype=dtype))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(build("vit").to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(images(dtype=dtype)), y)
    merged = model.merge_and_unload()
    # One rounding of W0 + ΔW in both, so the products see the same weights.
    torch.testing.assert_close(merged(images(dtype=dtype)), y, rtol=0, atol=0)


@both
def test_autocast_adapter_dtype_can_be_declined(method: str) -> None:
    base = build("vit").to(torch.bfloat16)
    model = get_peft_model(base, config(method, "vit"), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if ".snell_" in name} == {torch.bfloat16}
    assert model(images(dtype=torch.bfloat16)).isfinite().all()


@both
def test_status_and_parameter_report(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = peft_model(method, "vit")
    model.print_trainable_parameters()
    per_block = 8 * (3 * (32 + 32) + (32 + 32) + 2 * (32 + 128))
    scalars = 3 * 6 * 2 if method == "snella" else 0  # α, γ, β of 6 matrices in 2 blocks
    assert f"trainable params: {2 * per_block + scalars + 5 * 33:,}" in capsys.readouterr().out
    status = model.get_model_status()
    assert status.peft_types == {"default": method.upper()}
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (True, ["default"], 9)


def test_conversion_to_lora_at_full_rank_is_exact() -> None:
    model = peft_model("snell", "vit")
    settings, tensors = convert_to_lora(model, rank=32, adapter_name="default")
    assert settings.r == 32
    layer = snell_layers(model)["blocks.0.mlp.fc1"]
    A, B = (tensors[f"base_model.model.blocks.0.mlp.fc1.lora_{f}.weight"] for f in "AB")
    # An SVD in float32 restores entries of size 0.1 to a few hundred ulp.
    torch.testing.assert_close(B @ A, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    assert settings.target_modules == VIT_TARGETS
