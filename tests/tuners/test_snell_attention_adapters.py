"""nn.MultiheadAttention under SNELL: its life as an adapter, its noise in training, and what is refused."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from attention_models import CLOSE, HEADS, LENGTH, SAMPLES, WIDTH, Model, adapted, build, layer_of, tokens
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from snell_scale.tuners import SnellConfig


def test_snella_lets_them_compete() -> None:
    model = adapted(build(), init_sparsity=0.0, target_sparsity=0.5, total_ticks=2)
    layer, x = layer_of(model), tokens(LENGTH, 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for tick in range(3):
        cast(Any, model.base_model).allocate(tick)
        model(x, x, x)[0].square().sum().backward()
        optimizer.step()
        cast(Any, model.base_model).update_scores()
        optimizer.zero_grad()
    shares = layer.snell_sparsity["default"]
    assert len(set(shares.tolist())) == 4
    assert abs(shares.mean().item() - 0.5) <= 4 / (4 * WIDTH * WIDTH)  # at most one entry a matrix is left over


def test_merging_and_taking_it_back() -> None:
    model, x = adapted(build()), tokens(LENGTH, 1)
    layer = layer_of(model)
    before, weights = model(x, x, x), [w.clone() for w in layer._weights()]
    cast(Any, model).merge_adapter(safe_merge=True)
    assert layer.merged
    torch.testing.assert_close(model(x, x, x), before, **CLOSE)
    assert all(not torch.equal(w, old) for w, old in zip(layer._weights(), weights, strict=True))
    cast(Any, model).unmerge_adapter()
    torch.testing.assert_close(list(layer._weights()), weights, **CLOSE)
    torch.testing.assert_close(model(x, x, x), before, **CLOSE)


def test_a_broken_adapter_is_not_merged() -> None:
    model = adapted(build())
    layer = layer_of(model)
    weights = [w.clone() for w in layer._weights()]
    with torch.no_grad():
        layer.snell_A["default"][3, 0, 0, 0] = 1e200  # ΔW of out overflows
    with pytest.raises(ValueError, match="NaNs detected"):
        cast(Any, model).merge_adapter(safe_merge=True)
    assert all(torch.equal(w, old) for w, old in zip(layer._weights(), weights, strict=True))


def test_unloaded_it_is_plain_attention_again() -> None:
    base = build()
    model, x = adapted(copy.deepcopy(base)), tokens(LENGTH, 1)
    before = model(x, x, x)
    plain = cast(Any, model).merge_and_unload()
    assert type(plain.attn) is nn.MultiheadAttention
    assert plain.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(plain(x, x, x), before, **CLOSE)
    assert torch.equal(
        cast(Any, adapted(copy.deepcopy(base))).unload().attn.in_proj_weight, base.attn.in_proj_weight
    )


@pytest.mark.parametrize("settings", [{}, {"init_sparsity": 0.2, "target_sparsity": 0.8, "total_ticks": 4}])
def test_saved_and_loaded_it_computes_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = build(dtype=torch.float32)
    model, x = adapted(copy.deepcopy(base), **settings), tokens(LENGTH, 1, dtype=torch.float32)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(cast(Any, copy.deepcopy(base)), str(tmp_path)).eval()
    assert torch.equal(loaded(x, x, x)[0], model(x, x, x)[0])


def test_several_adapters_and_none() -> None:
    base = build()
    model, x = adapted(copy.deepcopy(base)), tokens(LENGTH, 1)
    first = model(x, x, x)[0]
    model.add_adapter("other", SnellConfig(r=8, sparsity=0.2, target_modules=["attn"], init_weights=False))
    model.set_adapter("other")
    other = model(x, x, x)[0]
    assert not torch.allclose(first, other, atol=1e-2)
    layer = layer_of(model)
    layer.set_adapter(["default", "other"])
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    weights = {
        "attn.in_proj_weight": base.attn.in_proj_weight + delta[: 3 * WIDTH],
        "attn.out_proj.weight": base.attn.out_proj.weight + delta[3 * WIDTH :],
    }
    torch.testing.assert_close(model(x, x, x)[0], functional_call(base, weights, (x, x, x))[0], **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(model(x, x, x), base(x, x, x), **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that the active adapter changes
        model.delete_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(model(x, x, x)[0], first, **CLOSE)


def test_disabled_while_merged_it_is_taken_back() -> None:
    base, x = build(), tokens(LENGTH, 1)
    model = adapted(copy.deepcopy(base))
    cast(Any, model).merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x, x, x), base(x, x, x), **CLOSE)


@pytest.mark.parametrize("batch_first", [False, True])
def test_drop_path_keeps_or_drops_the_deltas_of_a_sample(batch_first: bool) -> None:
    base = build(batch_first=batch_first)
    model = adapted(copy.deepcopy(base), drop_path=0.5).train()
    x = tokens(1, 1, batch_first=batch_first)  # of one token: attention weighs nothing, y = W_out (W_v x + …)
    layer, plain = layer_of(model), base.attn
    dv, dout = (layer.get_delta_weight("default").chunk(4)[i] for i in (2, 3))
    v, bv = plain.in_proj_weight[2 * WIDTH :], plain.in_proj_bias[2 * WIDTH :]
    found = model(x, x, x, need_weights=False)[0].detach()
    seen = set()
    for sample in range(SAMPLES):
        index = (sample, 0) if batch_first else (0, sample)
        ways = {
            (a, b): F.linear(
                F.linear(x[index], v + a * dv, bv), plain.out_proj.weight + b * dout, plain.out_proj.bias
            )
            for a in (0, 2)
            for b in (0, 2)
        }
        seen |= {way for way, y in ways.items() if torch.allclose(found[index], y, **CLOSE)}
    assert seen


def test_dropout_can_leave_the_out_projection_alone() -> None:
    base, x = build(), tokens(1, 1)
    model = adapted(copy.deepcopy(base), dropout=0.5, dropout_exclude_modules=["out_proj"]).train()
    layer, plain = layer_of(model), base.attn
    dv, dout = (layer.get_delta_weight("default").chunk(4)[i] for i in (2, 3))
    torch.manual_seed(9)
    found = model(x, x, x, need_weights=False)[0]
    torch.manual_seed(9)
    v, bv = plain.in_proj_weight[2 * WIDTH :], plain.in_proj_bias[2 * WIDTH :]
    value = F.linear(x, v, bv) + F.linear(F.dropout(x, 0.5), dv)
    torch.testing.assert_close(found, F.linear(value, plain.out_proj.weight + dout, plain.out_proj.bias), **CLOSE)


def test_a_name_that_is_no_adapted_layer_cannot_be_left_out_of_dropout() -> None:
    with pytest.raises(ValueError, match="matches none of the"):
        adapted(build(), dropout=0.5, dropout_exclude_modules=["proj"])


def test_encoders_and_decoders_of_torch_run_with_it() -> None:
    """Encoders once torch's fast path, which reads the attention's weights, is off; decoders have none."""
    x = tokens(LENGTH, 1, dtype=torch.float32)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = adapted(nn.TransformerEncoder(layer, 1).eval(), target_modules=["self_attn"])
        before = model(x)
        torch.testing.assert_close(cast(Any, model).merge_and_unload()(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 8, batch_first=True), 1).eval()
    model = adapted(decoder, target_modules=["self_attn", "multihead_attn"])
    before = model(x, x[:, :3])
    torch.testing.assert_close(cast(Any, model).merge_and_unload()(x, x[:, :3]), before)


class OwnAttention(nn.MultiheadAttention):
    """Attention that scales its queries in a forward of its own."""

    def forward(self, query: Tensor, *args: Any, **settings: Any) -> Any:
        return super().forward(query * 2, *args, **settings)


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = OwnAttention(WIDTH, HEADS)


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (Model(kdim=8, vdim=8), ["attn"], "attn has kdim=8 and vdim=8 beside embed_dim=16"),
        (Model(add_bias_kv=True), ["attn"], "attn has add_bias_kv or add_zero_attn"),
        (Model(add_zero_attn=True), ["attn"], "attn has add_bias_kv or add_zero_attn"),
        (OwnModel(), ["attn"], "attn is a OwnAttention, attention with a forward of its own"),
        (Model(), ["out_proj"], r"attn\.out_proj: .*target the nn\.MultiheadAttention itself"),
        (Model(), r"attn.*", r"attn\.out_proj: .*target the nn\.MultiheadAttention itself"),
        (nn.TransformerEncoderLayer(WIDTH, HEADS, 8), ["self_attn"], "reads this layer's weight without"),
        (Model(), ["attn"], "r=64 is too large for attn, whose matrices are 16×16"),
    ],
)
def test_what_cannot_be_adapted(model: nn.Module, targets: Any, message: str) -> None:
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        adapted(model, target_modules=targets, r=64 if "r=64" in message else 4)
    assert [type(m) for m in model.modules()] == before


def test_a_quantized_weight_is_refused() -> None:
    model = Model()
    model.attn.out_proj.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized weight"):
        adapted(model)


def test_calls_that_mean_nothing_are_refused() -> None:
    model, x = adapted(build()), tokens(LENGTH, 1)
    with pytest.raises(ValueError, match="give the mask"):
        model(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"a mask of attention is torch\.int64"):
        model(x, x, x, attn_mask=torch.zeros(LENGTH, LENGTH, dtype=torch.int64))
    base = layer_of(model).get_base_layer()
    base.forward = base.forward
    with pytest.raises(ValueError, match="was replaced"):
        model(x, x, x)
