"""nn.MultiheadAttention under SNELL computes what torch computes with merged weights, and so do its gradients."""

import copy
from typing import Any, cast

import pytest
import torch
from attention_models import CLOSE, HEADS, KEYS, LENGTH, SAMPLES, WIDTH, Model, adapted, build, layer_of, tokens
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from snell_scale.kernels.merge import merge_linear
from snell_scale.kernels.merge.reference import delta_weight_reference
from snell_scale.tuners.snell import attention as attention_module


def merged_by_hand(model: PeftModel, base: Model) -> Model:
    """The plain model with W0 + ΔW written into its weights."""
    delta = layer_of(model).get_delta_weight("default").detach()
    plain = copy.deepcopy(base)
    with torch.no_grad():
        plain.attn.in_proj_weight.add_(delta[: 3 * WIDTH])
        plain.attn.out_proj.weight.add_(delta[3 * WIDTH :])
    return plain


def masks() -> dict[str, dict[str, Tensor]]:
    """Named masks for SAMPLES × LENGTH queries and KEYS keys."""
    generator = torch.Generator().manual_seed(5)
    two = torch.rand(LENGTH, KEYS, generator=generator) < 0.3
    three = torch.rand(SAMPLES * HEADS, LENGTH, KEYS, generator=generator) < 0.3
    padding = torch.arange(KEYS).expand(SAMPLES, KEYS) >= torch.tensor([[KEYS], [KEYS - 1], [KEYS - 3]])
    for mask in (two, three):
        mask[..., 0] = False  # or a row could have nothing to attend to, and be NaN in both
    return {
        "none": {},
        "bool": {"attn_mask": two},
        "float": {"attn_mask": two.double() * -3},
        "bool by sample and head": {"attn_mask": three},
        "float by sample and head": {"attn_mask": three.double() * -3},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": padding.double() * -3},
        "both": {"attn_mask": two, "key_padding_mask": padding},
        "both by sample and head": {"attn_mask": three, "key_padding_mask": padding},
    }


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", list(masks()))
def test_it_computes_what_torch_does_with_merged_weights(
    mask: str, batch_first: bool, need_weights: bool
) -> None:
    base = build(batch_first=batch_first)
    model = adapted(copy.deepcopy(base))
    query, key = (tokens(n, n, batch_first=batch_first) for n in (LENGTH, KEYS))
    settings = {**masks()[mask], "need_weights": need_weights}
    y, weights = model(query, key, key, **settings)
    expected, expected_weights = merged_by_hand(model, base)(query, key, key, **settings)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert (weights is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights, **CLOSE)
    assert not torch.allclose(y, base(query, key, key, **settings)[0], atol=1e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "key is not value", "query is value"])
def test_every_mixture_of_inputs(kind: str, bias: bool) -> None:
    base = build(bias=bias)
    model = adapted(copy.deepcopy(base))
    a, b, c = (tokens(KEYS, seed) for seed in (1, 2, 3))
    inputs = {"self": (a, a, a), "cross": (a, b, b), "key is not value": (a, b, c), "query is value": (a, b, a)}
    expected = merged_by_hand(model, base)(*inputs[kind], need_weights=False)[0]
    torch.testing.assert_close(model(*inputs[kind], need_weights=False)[0], expected, **CLOSE)


@pytest.mark.parametrize("need_weights", [False, True])
def test_without_a_batch_and_by_head(need_weights: bool) -> None:
    base = build()
    model = adapted(copy.deepcopy(base))
    query, key = tokens(LENGTH, 1)[0], tokens(KEYS, 2)[0]
    padding = masks()["padding"]["key_padding_mask"][2]
    settings = {"need_weights": need_weights, "average_attn_weights": False, "key_padding_mask": padding}
    found, expected = (m(query, key, key, **settings) for m in (model, merged_by_hand(model, base)))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not need_weights or found[1].shape == (HEADS, LENGTH, KEYS)


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_causal_hint(need_weights: bool) -> None:
    base, x = build(), tokens(LENGTH, 1)
    model = adapted(copy.deepcopy(base))
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    plain = merged_by_hand(model, base).train()  # torch's fast path of evaluation forgets the hint's mask
    settings = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    torch.testing.assert_close(model(x, x, x, **settings)[0], plain(x, x, x, **settings)[0], **CLOSE)


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_dropout_draws_as_torch_does(need_weights: bool) -> None:
    base, x = build(dropout=0.4), tokens(LENGTH, 1)
    model = adapted(copy.deepcopy(base)).train()
    torch.manual_seed(2)
    found = model(x, x, x, need_weights=need_weights)
    torch.manual_seed(2)
    expected = merged_by_hand(model, base).train()(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found[0], model.eval()(x, x, x)[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"sparsity": None}, {"kernel": "mixk"}, {"dropout": 1e-9}],
    ids=["sparse", "dense", "mixk", "delta"],
)
def test_every_factor_gets_the_gradient_of_explicit_weights(settings: dict[str, Any], kind: str) -> None:
    """Against autograd of an nn.MultiheadAttention whose weights are W0 + ΔW, ΔW by the op's specification."""
    base = build()
    model = adapted(copy.deepcopy(base), **settings).train()  # a dropout of nearly nothing takes the delta path
    layer = layer_of(model)
    query = tokens(LENGTH, 1).requires_grad_()
    key = query if kind == "self" else tokens(KEYS, 2)
    direction = torch.randn(SAMPLES, LENGTH, WIDTH, dtype=torch.float64)
    (model(query, key, key, need_weights=False)[0] * direction).sum().backward()
    parameters = {n: p for n, p in layer.named_parameters() if "snell_" in n}
    found = {name: p.grad for name, p in parameters.items()} | {"query": query.grad}
    query.grad = None

    plan = layer.snell_plan["default"]
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    scalars = {n.split(".")[0].removeprefix("snell_"): p for n, p in leaves.items() if n[6:7] not in "AB"}
    delta = delta_weight_reference(
        leaves["snell_A.default"], leaves["snell_B.default"], sparsity=plan.sparsity, kernel=plan.kernel,
        weighting=plan.weighting, scale=plan.scale, kernel_params=scalars,
    )  # fmt: skip
    weights = {
        "attn.in_proj_weight": base.attn.in_proj_weight.detach() + delta[: 3 * WIDTH],
        "attn.out_proj.weight": base.attn.out_proj.weight.detach() + delta[3 * WIDTH :],
    }
    y = functional_call(base, weights, (query, key, key), {"need_weights": False})[0]
    (y * direction).sum().backward()
    expected = {name: leaf.grad for name, leaf in leaves.items()} | {"query": query.grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        # Relative to the largest entry: some are differences of nearly equal sums.
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item())
        if name != "query":
            assert all(bool(part.any()) for part in gradient), f"{name}: q, k, v and out each have a gradient"


def test_sparsities_that_competition_gave_apart_are_followed() -> None:
    base, x = build(), tokens(LENGTH, 1)
    model = adapted(copy.deepcopy(base), init_sparsity=0.1, target_sparsity=0.8, total_ticks=4, kernel="mixk")
    layer = layer_of(model)
    with torch.no_grad():
        layer.snell_sparsity["default"].copy_(torch.tensor([0.1, 0.9, 0.4, 0.7]))
        layer.snell_gamma["default"].copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    expected = merged_by_hand(model, base)(x, x, x)
    for _ in range(2):  # the second time a threshold is first looked for where it was
        torch.testing.assert_close(model(x, x, x), expected, **CLOSE)


def test_the_op_gets_the_weight_parameters_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(x: Tensor, weight: Tensor | None, *args: Any, **settings: Any) -> Tensor:
        seen.append(weight)
        return merge_linear(x, weight, *args, **settings)

    monkeypatch.setattr(attention_module, "merge_linear", spy)
    model = adapted(build())
    base = cast(nn.MultiheadAttention, layer_of(model).get_base_layer())
    for key in (tokens(LENGTH, 1), tokens(KEYS, 2)):
        seen.clear()
        query = tokens(LENGTH, 1)
        model(query, key, key)
        assert [
            weight is own for weight, own in zip(seen, (base.in_proj_weight, base.out_proj.weight), strict=True)
        ]
        assert all(isinstance(weight, nn.Parameter) for weight in seen)


def test_four_matrices_have_factors_and_thresholds_of_their_own() -> None:
    layer = layer_of(adapted(build(), sparsity=0.75))
    assert layer.snell_A["default"].shape == layer.snell_B["default"].shape == (4, 2, WIDTH, 2)
    parts = layer.get_delta_weight("default").chunk(4)
    # Of 256 entries ⌊0.75·255⌋ + 1 = 192 are at or below the threshold, in each matrix.
    assert [(part != 0).sum().item() for part in parts] == [64] * 4
    with torch.no_grad():
        layer.snell_B["default"][3].mul_(10)
    changed = layer.get_delta_weight("default").chunk(4)
    assert [torch.equal(a, b) for a, b in zip(parts, changed, strict=True)] == [True, True, True, False]
    assert layer.matrix_size("default") == WIDTH * WIDTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    exact = adapted(build(dtype=torch.float32)).double()  # factors are float32 beside either
    model = adapted(build(dtype=dtype))
    x = tokens(LENGTH, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y, weights = model(x.to(dtype), x.to(dtype), x.to(dtype), attn_mask=torch.zeros(LENGTH, LENGTH))
    assert y.dtype == torch.bfloat16
    # bf16 has 8 bits: errors of 1/256 of values up to 10, through two products.
    torch.testing.assert_close(y.double(), exact(x, x, x)[0], rtol=0.1, atol=0.3)
    y.float().sum().backward()
    found = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert found == {torch.float32}


def test_activation_checkpointing_gives_equal_gradients() -> None:
    model, x = adapted(build(dropout=0.3), drop_path=0.3).train(), tokens(LENGTH, 1)
    gradients = []
    for run in (model, lambda *inputs: checkpoint(model, *inputs, use_reentrant=False)):
        torch.manual_seed(7)
        model.zero_grad()
        cast(Any, run(x, x, x))[0].square().sum().backward()
        gradients.append(layer_of(model).snell_A["default"].grad.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
