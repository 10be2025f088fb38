"""The layer itself: which product it takes, its noise in training, its dtypes and its start values."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from snell_models import METHODS, build, config, images, snell_layers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_scale.kernels.merge import auto_scale, merge_linear
from snell_scale.tuners import SnellConfig
from snell_scale.tuners.snell import SnellConv2d, SnellLayer, SnellLinear
from snell_scale.tuners.snell import linear as linear_module


def adapted(layer: nn.Module, **settings: Any) -> SnellLayer:
    """The layer, in a model of its own, with an adapter of visible size."""
    settings = {"r": 4, "sparsity": 0.5, "init_weights": False} | settings
    torch.manual_seed(3)
    model = get_peft_model(nn.Sequential(layer), SnellConfig(target_modules=["0"], **settings))
    found = model.get_submodule("base_model.model.0")
    assert isinstance(found, SnellLayer)
    return found


def test_one_product_gets_the_weight_parameter_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(x: Tensor, weight: Tensor | None, *args: Any, **settings: Any) -> Tensor:
        seen.append(weight)
        return merge_linear(x, weight, *args, **settings)

    monkeypatch.setattr(linear_module, "merge_linear", spy)
    layer = adapted(nn.Linear(8, 8))
    layer(torch.randn(2, 8))
    assert len(seen) == 1
    assert seen[0] is layer.get_base_layer().weight
    assert isinstance(seen[0], nn.Parameter)


def test_a_base_with_its_own_forward_is_called() -> None:
    layer, x = adapted(nn.Linear(8, 8)), torch.randn(2, 8)
    expected = layer(x)
    base = layer.get_base_layer()
    calls = []
    plain = type(base).forward

    def hooked(x: Tensor) -> Tensor:
        calls.append(1)
        return plain(base, x)  # as an offloading hook does

    base.forward = hooked
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)  # two products instead of one
    assert calls == [1]


def test_drop_path_keeps_or_drops_whole_samples() -> None:
    layer, x = adapted(nn.Linear(8, 6), drop_path=0.25), torch.randn(200, 3, 8)
    layer.eval()
    base = layer.get_base_layer()(x)
    delta = layer(x) - base
    layer.train()
    ratio = (layer(x) - base) / delta
    first = ratio[:, :1, :1]
    torch.testing.assert_close(ratio, first.expand_as(ratio), rtol=1e-2, atol=1e-2)  # a difference of sums
    kept = (first > 0.5).float()
    torch.testing.assert_close(first, kept / 0.75, rtol=1e-2, atol=1e-2)
    assert 0.6 < kept.mean() < 0.9  # 0.75, five standard deviations of 200 samples


def test_drop_path_takes_an_image_without_batch_as_one_sample() -> None:
    layer, x = adapted(nn.Conv2d(2, 4, 3), drop_path=0.5), torch.randn(2, 8, 8)
    layer.eval()
    delta, base = layer(x) - layer.get_base_layer()(x), layer.get_base_layer()(x)
    layer.train()
    seen = {round(((layer(x) - base) / delta).median().item(), 2) for _ in range(30)}
    assert seen == {0.0, 2.0}


def test_dropout_is_on_the_input_of_the_delta() -> None:
    layer, x = adapted(nn.Linear(8, 6), dropout=0.5).train(), torch.randn(4, 8)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    expected = layer.get_base_layer()(x) + F.linear(F.dropout(x, 0.5), layer.get_delta_weight("default"))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)  # order of float32 additions
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, *merged(layer)), rtol=1e-5, atol=1e-6)


def merged(layer: SnellLayer) -> tuple[Tensor, Tensor | None]:
    base = layer.get_base_layer()
    return base.get_parameter("weight") + layer.get_delta_weight("default"), base.get_parameter("bias")


def test_dropout_is_left_out_where_excluded() -> None:
    settings = config("snell", "vit", dropout=0.3, dropout_exclude_modules=["proj"], drop_path=0.1)
    model = get_peft_model(build("vit"), settings)
    plans = {name: layer.snell_plan["default"] for name, layer in snell_layers(model).items()}
    assert {n.rpartition(".")[2]: p.dropout for n, p in plans.items()} == {
        "qkv": 0.3,
        "proj": 0.0,
        "fc1": 0.3,
        "fc2": 0.3,
    }
    assert {p.drop_path for p in plans.values()} == {0.1}


def test_fused_matrices_compete_apart() -> None:
    layer = adapted(nn.Linear(8, 12), sparsity=0.75, fused_groups={"0": 3})
    delta = layer.get_delta_weight("default")
    # Of 32 entries ⌊0.75·31⌋ + 1 = 24 are at or below the threshold, in each matrix.
    assert [(part != 0).sum().item() for part in delta.chunk(3)] == [8, 8, 8]
    with torch.no_grad():
        layer.snell_B["default"][1].mul_(10)
    changed = layer.get_delta_weight("default")
    assert torch.equal(changed[:4], delta[:4])
    assert torch.equal(changed[8:], delta[8:])
    assert not torch.equal(changed[4:8], delta[4:8])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sparsities_stay_float64(cast: torch.dtype) -> None:
    layer = get_peft_model(build("vit"), config("snella", "vit")).to(cast).to("cpu", cast)
    exact = torch.tensor([0.2] * 3, dtype=torch.float64)
    buffer = dict(layer.named_buffers())["base_model.model.blocks.0.attn.qkv.snell_sparsity.default"]
    assert torch.equal(buffer, exact)
    if cast != torch.float16:  # a float16 convolution of the patches is not on every CPU
        assert layer(images(dtype=cast)).dtype == cast
    assert {b.device.type for b in layer.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize(
    ("init_weights", "init_scale", "factor"), [(True, 1.0, 1.0), ("random", 1.0, 1.0), ("scaled", 3.0, 3.0)]
)
def test_start_of_the_factors(init_weights: Any, init_scale: float, factor: float) -> None:
    layer = adapted(
        nn.Linear(96, 120), r=8, init_weights=init_weights, init_scale=init_scale, fused_groups={"0": 2}
    )
    for container, features in ((layer.snell_A, 96), (layer.snell_B, 60)):
        bound = factor / math.sqrt(features * 8 / 2)
        values = container["default"]
        assert values.shape == (2, 2, features, 4)
        assert 0.95 * bound < values.abs().max() <= bound
        # The standard deviation of a uniform over ±bound, to 5 % with a thousand draws.
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_published_start_is_tiny() -> None:
    layer = adapted(nn.Linear(768, 768), r=32, sparsity=0.0, init_weights=True)
    # 7e-7 as measured for the published code at this size and rank.
    assert layer.get_delta_weight("default").std().item() == pytest.approx(7e-7, rel=0.1)


def test_zero_factors_are_a_saddle() -> None:
    layer, x = adapted(nn.Linear(8, 8), init_weights="zeros"), torch.randn(3, 8)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    layer(x).sum().backward()
    for container in (layer.snell_A, layer.snell_B):
        assert container["default"].grad.abs().sum() == 0


@pytest.mark.parametrize("kernel", ["distance", "mixk", "linear", "sigmoid", "rbf", "exponential"])
@pytest.mark.parametrize("base", [nn.Linear(16, 12), nn.Conv2d(4, 12, 2)])
def test_every_kernel_trains(kernel: Any, base: nn.Module) -> None:
    layer = adapted(base, kernel=kernel, sparsity=None, init_weights="random")
    delta = layer.get_delta_weight("default")
    # Small beside the weights (0.14 at this width); mixk adds a softmax over the outputs, 1/12 on average, and
    # a distance, not squared, reaches 0.5 of its kernel.
    assert delta.abs().mean() < {"mixk": 0.12, "exponential": 0.6, "rbf": 0.4}.get(kernel, 0.1)
    x = torch.randn(2, 16) if isinstance(base, nn.Linear) else torch.randn(2, 4, 5, 5)
    layer(x).square().sum().backward()
    moving = {"mixk": {"alpha", "gamma", "beta"}, "distance": set(), "linear": set()}.get(
        kernel, {"alpha", "gamma", "beta"}
    )
    for name in ("A", "B", *moving):
        assert getattr(layer, f"snell_{name}")["default"].grad.abs().sum() > 0, name
    for name in {"alpha", "gamma", "beta"} - moving:
        assert "default" not in getattr(layer, f"snell_{name}")


def test_automatic_scale_follows_each_matrix() -> None:
    model = get_peft_model(build("vit"), config("snell", "vit", scale="auto", rank_pattern={"fc1": 4}))
    scales = {name: layer.snell_plan["default"].scale for name, layer in snell_layers(model).items()}
    assert scales["blocks.0.attn.qkv"] == auto_scale(32, 32, 8, 2)
    assert scales["blocks.1.mlp.fc1"] == auto_scale(32, 128, 4, 2)
    assert scales["blocks.1.mlp.fc2"] == auto_scale(128, 32, 8, 2)


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    model = get_peft_model(build("vit"), config(method, "vit"))
    exact = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images())
    assert y.dtype == torch.bfloat16
    # Four layers in bf16 (8 bits) on outputs of size 1.
    torch.testing.assert_close(y.float(), exact, rtol=5e-2, atol=5e-2)
    y.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_activation_checkpointing_gives_equal_gradients() -> None:
    layer, x = adapted(nn.Linear(8, 8), dropout=0.5, drop_path=0.5).train(), torch.randn(4, 8)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(7)
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append(layer.snell_A["default"].grad.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_layer_classes_and_names() -> None:
    model = get_peft_model(
        build("conv"),
        config("snell", "conv", target_modules=["point", "head"], modules_to_save=None, rank_pattern={}, r=4),
    )
    assert isinstance(model.get_submodule("base_model.model.point"), SnellConv2d)
    head = model.get_submodule("base_model.model.head")
    assert isinstance(head, SnellLinear)
    assert repr(head).startswith("snell.SnellLinear(")
