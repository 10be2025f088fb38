"""timm models: what is built, from which weights, and what a mistake in the config says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.timm_models import TimmConfig
from snell_scale.registry import config_class, names

GRAY = InputSpec(1, 8, 8, (0.3,), (0.4,))
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}

# One small config per registered model family; adding one to the registry means adding one here.
SAMPLES: dict[str, dict[str, Any]] = {"timm": {"architecture": "vision_transformer", "arguments": TINY}}


def tiny(**changes: Any) -> TimmConfig:
    return TimmConfig.model_validate({"architecture": "vision_transformer", "arguments": TINY, **changes})


def build(config: TimmConfig, *, num_classes: int = 3, seed: int = 0) -> ModelBundle:
    return config.build(num_classes=num_classes, input_spec=GRAY, seed=seed)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The state dict of a tiny model with 5 classes."""
    path = tmp_path / "weights.safetensors"
    save_file(build(tiny(), num_classes=5, seed=7).module.state_dict(), path)
    return path


@pytest.mark.parametrize("name", names("model"))
def test_contract_the_bundle_describes_its_module(name: str) -> None:
    config = config_class("model", name).model_validate({"name": name, **SAMPLES[name]})
    bundle: ModelBundle = config.build(num_classes=3, input_spec=GRAY, seed=0)
    assert bundle.module(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    modules = dict(bundle.module.named_modules())
    parameters = dict(bundle.module.named_parameters())
    assert {*bundle.wrap_points, *bundle.head_modules} <= modules.keys()
    assert {*bundle.extra_trainable, *bundle.no_decay} <= parameters.keys()
    assert "all" in bundle.target_groups
    for pattern in bundle.target_groups.values():
        matched = [n for n in modules if re.fullmatch(pattern, n)]
        assert matched
        assert not any(n.startswith(head) for n in matched for head in bundle.head_modules)
    assert isinstance(config.describe(), str)
    assert all(p.requires_grad for p in parameters.values())


@pytest.mark.parametrize("name", names("model"))
def test_contract_the_seed_alone_decides_the_initial_weights(name: str) -> None:
    config = config_class("model", name).model_validate({"name": name, **SAMPLES[name]})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = config.build(num_classes=3, input_spec=GRAY, seed=5).module.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = config.build(num_classes=3, input_spec=GRAY, seed=5).module.state_dict()
    other = config.build(num_classes=3, input_spec=GRAY, seed=6).module.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_new_head_is_not_loaded_and_the_rest_is(weights: Path) -> None:
    saved = load_file(weights)
    module = build(tiny(weights=str(weights)), num_classes=3, seed=1).module
    fresh = build(tiny(), num_classes=3, seed=1).module.state_dict()
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, fresh[key] if key.startswith("head.") else saved[key])


def test_a_kept_head_is_loaded_too(weights: Path) -> None:
    saved = load_file(weights)
    module = build(tiny(weights=str(weights), head="keep"), num_classes=5).module
    assert all(torch.equal(tensor, saved[key]) for key, tensor in module.state_dict().items())


def test_a_kept_head_of_other_classes_is_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"head.weight is \(5, 16\) in the file, \(3, 16\).*model.head=new"):
        build(tiny(weights=str(weights), head="keep"))


def edited(path: Path, change: Any) -> str:
    content: dict[str, Tensor] = load_file(path)
    change(content)
    save_file(content, path)
    return str(path)


def test_missing_and_unexpected_keys_are_listed(weights: Path) -> None:
    path = edited(weights, lambda c: c.update(strange=c.pop("norm.weight")))
    with pytest.raises(ValueError, match="1 missing: norm.weight; 1 unexpected: strange"):
        build(tiny(weights=path))


def test_weights_of_another_width_are_refused(weights: Path) -> None:
    wider = {**TINY, "embed_dim": 32}
    with pytest.raises(
        ValueError, match=r"of another shape: cls_token is \(1, 1, 16\) in the file, \(1, 1, 32\)"
    ):
        build(tiny(arguments=wider, weights=str(weights)))


@pytest.mark.parametrize("keep", [20, 500], ids=["inside the header", "inside the data"])
def test_a_cut_weights_file_is_refused(weights: Path, keep: int) -> None:
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        tiny(weights=str(weights)).check()


def test_absent_weights_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file .*absent.safetensors"):
        tiny(weights=str(tmp_path / "absent.safetensors")).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "vit_bse_patch16_224", "arguments": {}}, "did you mean vit_base_patch16_224"),
        ({"architecture": "test_vit.nope", "arguments": {}}, "no weights tagged 'nope'; it has: test_vit.r160"),
        ({"arguments": {"embed_dm": 16}}, "'embed_dm': did you mean 'embed_dim'"),
        ({"arguments": {**TINY, "num_heads": 3}}, "refuses to build.*divisible by num_heads"),
        ({"arguments": {**TINY, "patch_size": 3}}, "3x3 patches do not divide the data's 8x8"),
        ({"architecture": "test_resnet", "arguments": {"depth": 3}}, "refuses to build test_resnet.*depth"),
        ({"weights": "pretrained"}, "timm has no weights for 'vision_transformer'"),
        ({"architecture": "test_vit", "arguments": {}, "weights": "pretrained", "head": "keep"}, "1000 classes"),
    ],
)
def test_what_cannot_be_built_says_why(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny(**settings))


def test_arguments_that_follow_from_the_data_are_refused() -> None:
    with pytest.raises(ValidationError, match="img_size.*follow from the data"):
        tiny(arguments={**TINY, "img_size": 32})


def test_the_label_names_architecture_and_arguments() -> None:
    assert TimmConfig(architecture="vit_base_patch16_224").describe() == "vit_base_patch16_224"
    assert tiny(arguments={"depth": 2}).describe() == "vision_transformer(depth=2)"
