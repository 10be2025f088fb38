"""Every method on a CLIP: what trains, and that plain peft and open_clip reload it."""

import json
from pathlib import Path
from typing import Any, cast

import open_clip
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import MultiheadAttention as LoraMultiheadAttention
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snell_scale.interfaces import ModelBundle, Tuner
from snell_scale.tuners.methods.gps import GpsTuner
from snell_scale.tuners.snell import SnellMultiheadAttention
from tests.models.clip_cases import METHODS, SMALL, build, pairs, tune

PEFT_METHODS = ("lora", "klora", "snell", "snella")


def loss_of(module: nn.Module) -> Tensor:
    image, text, scale = module(*pairs(0))
    return nn.functional.cross_entropy(scale * image @ text.T, torch.arange(len(image)))


def trained(bundle: ModelBundle, method: str, **settings: Any) -> Tuner:
    """The tuner after some steps on one batch, without an engine (GPS masks its gradients through one)."""
    tuner = tune(bundle, method, **settings)
    if isinstance(tuner, GpsTuner):
        tuner.select(iter([loss_of(tuner.module)]), lambda tensors: None)
    optimizer = torch.optim.Adam([p for p in tuner.module.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(5):
        loss_of(tuner.module).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuner


def save(tuner: Tuner, folder: Path) -> None:
    state = tuner.module.state_dict()
    tuner.save(folder, {name: state[name] for name in tuner.saved_names()})


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains(method: str) -> None:
    bundle = build()
    tuner = tune(bundle, method)
    before = {name: p.detach().clone() for name, p in tuner.module.named_parameters() if p.requires_grad}
    loss = loss_of(tuner.module)
    loss.backward()
    assert tuner.num_trainable() > 0
    # LoRA's A has no gradient while B is zero.
    without = [n for n in before if "lora_A" not in n and not cast(Any, tuner.module.get_parameter(n).grad).any()]
    assert without == []
    later = trained(build(), method).module
    assert loss_of(later) < loss


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_open_clips_own_model_reloads_an_adapter(tmp_path: Path, method: str) -> None:
    """With plain peft and open_clip alone: the model from a folder as the hub has it, the adapter from ours."""
    bundle = build()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    save_file(bundle.module.state_dict(), folder / "open_clip_model.safetensors")
    tuner = trained(bundle, method, train_extra=True)
    save(tuner, tmp_path / "adapter")
    expected = tuner.module.eval()(*pairs(9))

    clip = cast(nn.Module, open_clip.create_model(f"local-dir:{folder}")).eval()
    untrained = clip(*pairs(9))
    assert clip.get_parameter("logit_scale").shape == ()
    loaded = PeftModel.from_pretrained(cast(Any, clip), str(tmp_path / "adapter")).eval()
    for found, wanted, other in zip(loaded(*pairs(9)), expected, untrained, strict=True):
        torch.testing.assert_close(found, wanted)  # LoRA is merged anew for every product
        assert not torch.allclose(found, other, atol=1e-3)
    merged = cast(Any, loaded).merge_and_unload()
    assert not any("snell" in name or "lora" in name for name in merged.state_dict())
    assert {type(m) for m in merged.modules()} == {type(m) for m in cast(Any, open_clip.CLIP(**SMALL)).modules()}
    for found, wanted in zip(merged(*pairs(9)), expected, strict=True):
        # float32: W0 + ΔW is rounded once more, in features of length 1 and a scale of 14.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_names_in_an_adapter_file_are_open_clips(tmp_path: Path) -> None:
    save(trained(build(), "snell", targets="attention"), tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    blocks = [f"{prefix}transformer.resblocks.{i}.attn" for prefix in ("visual.", "") for i in range(2)]
    assert names == {f"base_model.model.{block}.snell_{factor}" for block in blocks for factor in "AB"}


def test_lora_on_attention_trains_and_merges() -> None:
    """peft's own layer; on out_proj alone peft would take it without a word, and nothing would change."""
    tuner = trained(build(), "lora", targets="attention")
    layers = [m for m in tuner.module.modules() if isinstance(m, LoraMultiheadAttention)]
    assert len(layers) == 4
    for layer in layers:
        for part in (layer, layer.base_layer.out_proj):
            assert cast(Any, part).lora_B["default"].weight.abs().max() > 0
    before = tuner.module.eval()(*pairs(9))
    merged = cast(Any, tuner.module).merge_and_unload()
    for found, wanted in zip(merged(*pairs(9)), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_lora_with_dropout_on_attention_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"method\.dropout is 0\.1, .*resblocks\.0\.attn, an nn\.MultiheadAttention"
    ):
        tune(build(), "lora", dropout=0.1)
    tune(build(), "lora", dropout=0.1, targets="mlp")


def test_shira_says_what_it_can_adapt() -> None:
    with pytest.raises(ValueError, match=r"no linear layer: SHiRA .* to 'linear' or 'mlp'$"):
        tune(build(), "shira", r=4)
    tuner = tune(build(), "shira", r=4, targets="linear")
    loss_of(tuner.module).backward()
    assert all(p.grad is not None and p.grad.any() for p in tuner.module.parameters() if p.requires_grad)


def test_a_probe_has_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="method.name=probe trains the head alone, and this model has none"):
        tune(build(), "probe")


def test_gps_chooses_in_every_matrix_of_attention() -> None:
    tuner = trained(build(), "gps", per_neuron=2)
    chosen = cast(Any, tuner).state_dict()["chosen"]
    for prefix in ("visual.", ""):
        attention = f"{prefix}transformer.resblocks.0.attn"
        assert len(chosen[f"{attention}.in_proj_weight"]) == 2 * 3 * 32
        assert len(chosen[f"{attention}.out_proj.weight"]) == 2 * 32
    assert not [name for name in chosen if "embedding" in name or "ln_" in name]


@pytest.mark.parametrize("method", ["bias", "gps", "full"])
def test_a_tower_that_is_left_out_does_not_train(method: str) -> None:
    tuner = tune(build(towers="image"), method)
    names = [name for name, p in tuner.module.named_parameters() if p.requires_grad]
    assert names
    assert [name for name in names if not name.startswith("visual.")] in ([], ["logit_scale"])


def test_full_tuning_of_a_clip_is_weights_for_the_next(tmp_path: Path) -> None:
    tuner = trained(build(), "full")
    save(tuner, tmp_path)
    again = build(weights=str(tmp_path / "trained.safetensors")).module
    for found, wanted in zip(again.eval()(*pairs(9)), tuner.module.eval()(*pairs(9)), strict=True):
        assert torch.equal(found, wanted)


def test_adapted_attention_is_ours() -> None:
    module = tune(build(), "snell").module
    assert sum(isinstance(m, SnellMultiheadAttention) for m in module.modules()) == 4
