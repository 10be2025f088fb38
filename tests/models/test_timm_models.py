"""timm models: what is built, from which weights, and what a mistake in the config says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from snell_scale.interfaces import InputSpec, ModelBundle, Preprocessing
from snell_scale.models.timm.config import TimmConfig

GRAY = InputSpec(1, 8, 8, (0.3,), (0.4,))
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}


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


VIT = "vit_base_patch16_224"
HALF, IMAGENET = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)


def published(architecture: str, **changes: Any) -> InputSpec:
    spec = TimmConfig(architecture=architecture, **changes).preprocessing().image
    assert spec is not None
    return spec


@pytest.mark.parametrize(
    ("architecture", "size", "mean", "crop"),
    [
        (VIT, 224, HALF, 0.9),
        ("vit_large_patch16_224.mae", 224, IMAGENET, 0.9),
        ("vit_base_patch14_dinov2", 518, IMAGENET, 1.0),
        ("eva02_large_patch14_448", 448, (0.48145466, 0.4578275, 0.40821073), 1.0),
        ("convnext_base", 224, IMAGENET, 0.875),
    ],
)
def test_the_input_is_what_timms_entry_of_the_name_says(
    architecture: str, size: int, mean: tuple[float, ...], crop: float
) -> None:
    spec = published(architecture)
    assert (spec.channels, spec.height, spec.width) == (3, size, size)
    assert (spec.mean, spec.interpolation, spec.crop_fraction) == (mean, "bicubic", crop)


def test_an_explicit_transformer_leaves_the_input_to_the_data(weights: Path) -> None:
    assert tiny().preprocessing() == Preprocessing()
    assert tiny(weights=str(weights)).preprocessing() == Preprocessing()


def plain_vit() -> dict[str, Tensor]:
    names = ("cls_token", "pos_embed", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.weight")
    return {name: torch.zeros(1) for name in names}


def test_the_weights_layout_goes_before_the_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mae, jax = tmp_path / "mae.pth", tmp_path / "jax.npz"
    torch.save({"model": plain_vit()}, mae)
    np.savez(jax, allow_pickle=False, **{"embedding/kernel": np.zeros(1)})
    assert published(VIT, weights=str(mae)).mean == IMAGENET
    assert published("vit_large_patch16_224.mae", weights=str(jax)).mean == HALF
    assert not capfd.readouterr().err


def test_statistics_that_nothing_tells_are_said_to_be_guessed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plain.pth"
    torch.save(plain_vit(), path)
    assert published(VIT, weights=str(path)).mean == HALF
    assert "does not tell which mean it expects" in capfd.readouterr().err
    assert published(f"{VIT}.dino", weights=str(path)).mean == IMAGENET
    assert published("convnext_base.fb_in1k", weights=str(path)).mean == IMAGENET
    assert not capfd.readouterr().err


def test_the_config_goes_before_both(tmp_path: Path) -> None:
    path = tmp_path / "jax.npz"
    np.savez(path, allow_pickle=False, **{"embedding/kernel": np.zeros(1)})
    given: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0], "interpolation": "bilinear"}
    spec = published(VIT, weights=str(path), **given)
    assert (spec.mean, spec.std, spec.interpolation) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bilinear")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": [0.5]}, "mean does nothing for vision_transformer"),
        ({"architecture": VIT, "arguments": {}, "mean": [0.5], "std": [0.5] * 3}, "mean has 1 numbers and std 3"),
        ({"architecture": VIT, "arguments": {}, "std": [0.5, 0.0, 0.5]}, "std is .*above 0"),
    ],
)
def test_statistics_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(**settings)


def test_one_mean_for_three_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.mean has 1 numbers, the weights take 3 channels"):
        published(VIT, mean=[0.5])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A timm model in the layout of its hub."""
    module = timm.create_model("test_vit", num_classes=5)
    timm.models.save_for_hf(module, str(tmp_path / "hub"), safe_serialization=True)
    return tmp_path / "hub"


def test_a_folder_in_the_hubs_layout(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    config = TimmConfig(architecture=f"local-dir:{folder}", weights="pretrained", head="keep")
    spec = config.preprocessing().image
    assert spec is not None
    assert (spec.height, spec.mean) == (160, HALF)
    module = config.build(num_classes=5, input_spec=spec, seed=0).module
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(ValueError, match="has 5 classes and the data 3"):
        config.build(num_classes=3, input_spec=spec, seed=0)


def test_a_folder_without_a_model_is_refused(folder: Path) -> None:
    config = TimmConfig(architecture=f"local-dir:{folder}", weights="pretrained")
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"could not be read.*expected the config.json"):
        config.check()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"could not be read.*expected the config.json"):
        config.check()


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = TimmConfig(architecture="hf-hub:timm/no_such_model", weights="pretrained")
    config.check()
    with pytest.raises(ValueError, match=r"could not be read.*local-dir:PATH"):
        config.preprocessing()


def test_arguments_that_follow_from_the_data_are_refused() -> None:
    with pytest.raises(ValidationError, match="img_size.*follow from the data"):
        tiny(arguments={**TINY, "img_size": 32})


def test_the_label_names_architecture_and_arguments() -> None:
    assert TimmConfig(architecture="vit_base_patch16_224").describe() == "vit_base_patch16_224"
    assert tiny(arguments={"depth": 2}).describe() == "vision_transformer(depth=2)"
