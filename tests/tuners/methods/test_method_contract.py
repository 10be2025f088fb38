"""What every registered method must do: train what it says, nothing else, and save it completely."""

import io
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from torch import nn

from snell_scale.tuners.methods.trained_file import METHOD_FILE, load_trained
from tests.tuners.methods.tiny_training import METHODS, apply, convnet, logits, method, save, train, vit


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("train_extra", [False, True])
def test_training_changes_exactly_the_trainable_parameters(name: str, train_extra: bool) -> None:
    bundle = vit()
    tuner = apply(name, bundle, train_extra=train_extra)
    trainable = {n for n, p in tuner.module.named_parameters() if p.requires_grad}
    before = snapshot(tuner.module)
    train(tuner, bundle)
    after = snapshot(tuner.module)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n for n in changed if "snell_sparsity" not in n} == trainable
    assert any("cls_token" in n for n in trainable) == (train_extra or name == "full")
    heads = {n.split("head.")[1].removeprefix("modules_to_save.default.") for n in trainable if "head." in n}
    assert heads == {"weight", "bias"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("train_extra", [False, True])
def test_saved_and_loaded_again_the_logits_are_equal(name: str, train_extra: bool, tmp_path: Path) -> None:
    bundle = vit()
    tuner = apply(name, bundle, train_extra=train_extra)
    train(tuner, bundle)
    folder = tmp_path / "adapter"
    assert save(tuner, folder) == sum(path.stat().st_size for path in folder.iterdir())
    base = vit()
    assert not torch.equal(logits(base.module, base), logits(tuner.module, bundle))
    assert torch.equal(logits(reloaded(base.module, folder), base), logits(tuner.module, bundle))


def reloaded(module: nn.Module, folder: Path) -> nn.Module:
    """With peft alone where peft wrote the folder."""
    if (folder / METHOD_FILE).exists():
        load_trained(module, folder)
        return module
    return peft.PeftModel.from_pretrained(cast(Any, module), str(folder))


@pytest.mark.parametrize("name", METHODS)
def test_new_parameters_are_a_function_of_the_seed(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = snapshot(apply(name, vit(), seed=3).module)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = snapshot(apply(name, vit(), seed=3).module)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", METHODS)
def test_names_without_decay_are_parameters(name: str) -> None:
    tuner = apply(name, vit())
    assert {n.split(".")[-1] for n in tuner.no_decay} >= {"cls_token", "pos_embed"}
    assert tuner.no_decay <= {n for n, _ in tuner.module.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_the_state_survives_a_checkpoint_without_pickle(name: str) -> None:
    bundle = vit()
    tuner = apply(name, bundle)
    train(tuner, bundle)
    file = io.BytesIO()
    torch.save(tuner.state_dict(), file)
    file.seek(0)
    fresh = apply(name, vit())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(fresh.state_dict(), tuner.state_dict())


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    else:
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", METHODS)
def test_frozen_batch_norms_keep_their_statistics_and_reload_exactly(name: str, tmp_path: Path) -> None:
    """No adapter file holds batch statistics, so what is frozen must not gather any."""
    bundle = convnet()
    # SHiRA adapts linear layers only, and this model has none below its head.
    if name == "shira":
        with pytest.raises(ValueError, match="no linear layer: SHiRA"):
            apply(name, bundle)
        return
    tuner = apply(name, bundle)
    before = snapshot(tuner.module)
    train(tuner, bundle, steps=2)
    moved = {n for n, t in tuner.module.state_dict().items() if "running" in n and not torch.equal(t, before[n])}
    assert bool(moved) == (name in ("full", "bias"))  # whose batch norms train
    save(tuner, tmp_path / "adapter")
    base = convnet()
    assert torch.equal(logits(reloaded(base.module, tmp_path / "adapter"), base), logits(tuner.module, bundle))


@pytest.mark.parametrize("name", METHODS)
def test_one_field_switches_the_method(name: str) -> None:
    shared = {"r": 4, "targets": ["qkv", "fc1"], "train_extra": False}
    config = method(name, **shared)
    assert (config.name, config.r, config.targets) == (name, 4, ("qkv", "fc1"))
    assert type(config).model_validate(config.model_dump(mode="json")) == config
    assert type(config).__doc__


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_rank_is_asked_for_where_there_is_one(name: str) -> None:
    if name in ("probe", "bias", "full", "gps"):
        assert method(name, r=None).r is None
        return
    with pytest.raises(ValueError, match="set method.r"):
        method(name, r=None)
