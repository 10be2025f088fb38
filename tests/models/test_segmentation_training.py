"""Training on segmentation models: gradients, checkpointed activations, adapters that plain peft reloads."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from snell_scale.interfaces import ModelBundle
from snell_scale.models.activation_checkpointing import checkpoint_activations
from snell_scale.registry import config_class
from tests.models.segmentation_parts import (
    FAMILIES,
    NARROW,
    PLAIN,
    build,
    count,
    family,
    images,
    loss_of,
)


@pytest.mark.parametrize("method", ["lora", "snell"])
@family
def test_gradients_reach_every_adapter_factor_and_the_whole_decoder(
    method: str, architecture: str, arguments: dict[str, Any], side: int, decoder: str
) -> None:
    # Without stochastic depth: a block that it skips for all samples gets no gradient.
    options = {**NARROW[decoder], "drop_path": 0.0}
    bundle = build(architecture, arguments=arguments, side=side, decoder=decoder, **options)
    heads = {
        f"{n}.{p}" for n in bundle.head_modules for p, _ in bundle.module.get_submodule(n).named_parameters()
    }
    targets = [n for n, _ in bundle.module.named_modules() if re.fullmatch(bundle.target_groups["all"], n)]
    tuner = apply(method, bundle)
    leave_no_zeros(tuner.module)
    loss_of(tuner.module.train(), images(2, side, side)).backward()
    trained = {name: p for name, p in tuner.module.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    names = "\n".join(trained)
    assert len(trained) == len(heads) + 2 * len(targets)
    assert all(f"base_model.model.{target}." in names for target in targets)
    assert count(nn.ParameterList(trained.values())) == tuner.num_trainable()


def apply(method: str, bundle: ModelBundle) -> Any:
    settings = {"snell": {"sparsity": 0.5, "scale": 1.0}}.get(method, {})
    config = config_class("method", method).model_validate({"name": method, "r": 2, **settings})
    return config.apply(bundle, total_steps=4, steps_per_epoch=2, seed=0)


def leave_no_zeros(module: nn.Module) -> None:
    """Behind LoRA's zero factor, and a ResNet block's zero scale, no gradient reaches the others."""
    for name, parameter in module.named_parameters():
        if not parameter.any():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize(("architecture", "arguments", "side", "decoder"), [*PLAIN, FAMILIES[4], FAMILIES[6]])
def test_activation_checkpointing_recomputes_blocks_and_changes_nothing(
    architecture: str, arguments: dict[str, Any], side: int, decoder: str
) -> None:
    gradients, num_calls = [], []
    for recomputes in (False, True):
        bundle = build(architecture, arguments=arguments, side=side, decoder=decoder, **NARROW[decoder])
        calls: list[str] = []
        for name in bundle.wrap_points:
            inner = next(
                child for child in bundle.module.get_submodule(name).modules() if isinstance(child, nn.Linear)
            )
            inner.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
        names = list(bundle.module.state_dict())
        if recomputes:
            checkpoint_activations(bundle.module, bundle.wrap_points)
        assert list(bundle.module.state_dict()) == names
        torch.manual_seed(0)  # Swin drops whole paths
        loss_of(bundle.module.train(), images(2, side, side)).backward()
        gradients.append([p.grad for p in bundle.module.parameters()])
        num_calls.append(len(calls))
    assert num_calls[1] == 2 * num_calls[0] > 0
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("method", ["lora", "snell"])
@pytest.mark.parametrize("decoder", NARROW)
def test_plain_peft_reloads_adapter_and_decoder(method: str, decoder: str, tmp_path: Path) -> None:
    bundle = build(decoder=decoder, **NARROW[decoder])
    tuner = apply(method, bundle)
    optimizer = torch.optim.SGD([p for p in tuner.module.parameters() if p.requires_grad], lr=0.1)
    for seed in range(2):
        loss_of(tuner.module.train(), images(2, 16, 16, seed=seed)).backward()
        optimizer.step()
    state = tuner.module.state_dict()
    tuner.save(tmp_path, {name: state[name] for name in tuner.saved_names()})
    fresh = build(decoder=decoder, **NARROW[decoder]).module
    untrained = fresh.eval()(images(1, 16, 16))
    reloaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    expected = tuner.module.eval()(images(1, 16, 16))
    assert torch.equal(reloaded(images(1, 16, 16)), expected)
    assert not torch.allclose(untrained, expected)
    merged = reloaded.merge_and_unload()(images(1, 16, 16))
    # One product with W + delta in place of two: float32 rounding through five blocks and the decoder.
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
