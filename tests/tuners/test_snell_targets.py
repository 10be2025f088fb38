"""Where adapters go: names, regexes, 'all-linear', exclusions, published counts, and what cannot be adapted."""

import re
import warnings
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from snell_models import VIT_TARGETS, build, config, snell_layers
from torch import nn

from snell_scale.tuners import SnellaConfig, SnellConfig


def adapt(model: nn.Module, targets: Any, **settings: Any) -> list[str]:
    settings = {"r": 4, "sparsity": 0.5} | settings
    return list(snell_layers(get_peft_model(model, SnellConfig(target_modules=targets, **settings))))


@pytest.mark.parametrize(
    ("name", "rank", "count"),
    [
        ("vit_base_patch16_224", 8, 1_327_104),
        ("vit_base_patch16_224", 32, 5_308_416),
        ("vit_large_patch16_224", 32, 14_155_776),
        ("vit_huge_patch14_224", 32, 23_592_960),
    ],
)
def test_published_parameter_counts(name: str, rank: int, count: int) -> None:
    with torch.device("meta"):
        base = timm.create_model(name)
    model = get_peft_model(base, SnellConfig(r=rank, sparsity=0.9, target_modules=VIT_TARGETS))
    assert model.get_nb_trainable_parameters()[0] == count
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_snella_adds_three_scalars_per_matrix() -> None:
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch16_224")
    settings = SnellaConfig(r=8, init_sparsity=0.0, target_sparsity=0.8, target_modules=VIT_TARGETS)
    model = get_peft_model(base, settings)
    assert model.get_nb_trainable_parameters()[0] == 1_327_104 + 12 * 6 * 3


def test_all_linear_leaves_the_classifier_out() -> None:
    inner = [f"blocks.{i}.{m}" for i in range(2) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert adapt(build("vit"), "all-linear") == inner
    assert adapt(build("vit"), "all-linear", modules_to_save=["head"]) == inner
    assert adapt(build("vit"), "all-linear", exclude_modules=["fc1", "fc2"]) == [
        n for n in inner if "fc" not in n
    ]


def test_all_linear_for_a_second_adapter() -> None:
    settings = SnellConfig(r=4, sparsity=0.5, target_modules="all-linear", modules_to_save=["head"])
    model = get_peft_model(build("vit"), settings)
    before = list(snell_layers(model))
    model.add_adapter("other", SnellConfig(r=8, sparsity=None, target_modules="all-linear"))
    assert list(snell_layers(model)) == before
    assert all("other" in layer.snell_A for layer in snell_layers(model).values())


def test_all_linear_in_an_unknown_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Conv2d(4, 4, 1))
    with pytest.warns(UserWarning, match=r"leaves out 1\.out_proj"):
        assert adapt(model, "all-linear") == ["0"]
    with pytest.raises(ValueError, match=r"found no nn\.Linear"):
        adapt(nn.Sequential(nn.Conv2d(4, 4, 1)), "all-linear")


def test_the_config_names_what_all_linear_found() -> None:
    settings = SnellConfig(r=4, sparsity=0.5, target_modules="all-linear")
    get_peft_model(build("vit"), settings)
    assert settings.target_modules == sorted(adapt(build("vit"), VIT_TARGETS))


def test_layers_to_transform() -> None:
    names = adapt(build("vit"), ["fc1"], layers_to_transform=[1], layers_pattern="blocks")
    assert names == ["blocks.1.mlp.fc1"]


def test_rank_pattern_and_fused_groups() -> None:
    settings = config("snell", "vit", rank_pattern={"fc1": 4, r"blocks\.1\.attn\.qkv": 2})
    model = get_peft_model(build("vit"), settings)
    shapes = {name: tuple(layer.snell_B["default"].shape) for name, layer in snell_layers(model).items()}
    assert shapes["blocks.0.attn.qkv"] == (3, 2, 32, 4)
    assert shapes["blocks.1.attn.qkv"] == (3, 2, 32, 1)
    assert shapes["blocks.0.mlp.fc1"] == (1, 2, 128, 2)


GROUPED = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))


class OwnConv(nn.Conv2d):
    """A convolution that pads in a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


def quantized() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("model", "targets", "settings", "message"),
    [
        (build("vit"), None, {}, "target_modules is missing: give a list"),
        (build("vit"), ["q_proj"], {}, r"'q_proj' matches no module.*'qkv', 'proj', 'fc1'.*blocks\.0\.attn\.qkv"),
        (build("vit"), ["qkv", "tpyo"], {}, "'tpyo' matches no module"),
        (build("vit"), r"layers\.\d+\.qkv", {}, "matches no module"),
        (nn.Sequential(nn.ReLU()), ["0.x"], {}, r"no nn\.Linear, nn\.Conv2d or nn\.MultiheadAttention to adapt"),
        (build("vit"), ["qkv"], {"exclude_modules": ["qkv"]}, "exclude"),
        (build("vit"), ["fc1"], {"r": 64}, r"r=64 is too large for blocks\.0\.mlp\.fc1.*128×32.*at most 32"),
        (build("vit"), ["fc1"], {"rank_pattern": {"fc1": 64}}, r"r=64 is too large for blocks\.0\.mlp\.fc1"),
        (build("vit"), ["qkv"], {"fused_groups": {"qkv": 5}}, "96 output features.*5 matrices"),
        (
            build("vit"),
            ["qkv", "norm2"],
            {},
            r"blocks\.0\.norm2 is a timm\.layers\.norm\.LayerNorm",
        ),
        (build("vit"), ["attn"], {}, r"blocks\.0\.attn is a timm.*Attention"),
        (GROUPED, ["0"], {}, "0 is a convolution in 8 groups"),
        (nn.Sequential(OwnConv(8, 8, 3)), ["0"], {}, "OwnConv, a convolution with a forward of its own"),
        (nn.Sequential(nn.Conv1d(8, 8, 3)), ["0"], {}, "Conv1d; SNELL adapts"),
        (nn.Sequential(nn.Embedding(8, 8)), ["0"], {}, "Embedding; SNELL adapts"),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), ["out_proj"], {}, "reads this layer's weight without"),
        (nn.TransformerEncoderLayer(8, 2, 8), ["linear1"], {}, "reads this layer's weight without"),
        (quantized(), ["0"], {}, "quantized weight"),
        (build("vit"), ["qkv"], {"dropout": 0.1, "dropout_exclude_modules": ["proj"]}, "matches none of the 2"),
    ],
)
def test_what_cannot_be_adapted(model: nn.Module, targets: Any, settings: dict[str, Any], message: str) -> None:
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        adapt(model, targets, **settings)
    assert [type(m) for m in model.modules()] == before  # nothing was replaced before the error


def test_another_methods_layer_is_not_wrapped() -> None:
    model = get_peft_model(build("vit"), LoraConfig(r=2, target_modules=["fc1"])).get_submodule(
        "base_model.model"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of the second method, too
        with pytest.raises(ValueError, match="already has an adapter of type Linear"):
            adapt(model, ["fc1"])


def test_encoder_layers_are_taken_without_their_fast_path() -> None:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert adapt(nn.TransformerEncoderLayer(8, 2, 8), ["linear1"]) == ["linear1"]
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
