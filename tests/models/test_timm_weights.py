"""Published weight files in timm models: every layout gives the tensors it was made from, or is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from published import TORCH_LAYOUTS, State, jax_big_vision, jax_vit, mae_encoder, swin
from safetensors.torch import save_file

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.timm.config import TimmConfig
from snell_scale.models.timm.weights import recipe_of

TRANSFORMER = {"embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}
VIT: tuple[str, dict[str, Any], int] = ("vit_base_patch16_224", TRANSFORMER, 32)

# layout → (architecture, arguments, pixels)
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mae encoder": VIT,
    "mae with decoder": VIT,
    "moco v3": VIT,
    "dino training": VIT,
    "dinov2": ("vit_base_patch14_dinov2", TRANSFORMER, 28),
    "dinov2 giant with registers": ("vit_giant_patch14_reg4_dinov2", {**TRANSFORMER, "embed_dim": 24}, 28),
    "dinov3": ("vit_base_patch16_dinov3", TRANSFORMER, 32),
    "dinov3 with biases": ("vit_base_patch16_dinov3_qkvb", TRANSFORMER, 32),
    "clip": ("vit_base_patch16_clip_224", TRANSFORMER, 32),
    "swin": ("swin_base_patch4_window7_224", SWIN, 32),
    "convnext": ("convnext_base", CONVNEXT, 64),
    "convnext v2": ("convnextv2_base", CONVNEXT, 64),
    "eva-02": ("eva02_large_patch14_448", TRANSFORMER, 28),
    "eva": ("eva_giant_patch14_224", TRANSFORMER, 28),
    "eva pre-trained": ("eva_giant_patch14_224", TRANSFORMER, 28),
    "ddp": VIT,
}


def source(model: tuple[str, dict[str, Any], int], *, num_classes: int = 5) -> State:
    """The state dict of the tiny model, random where a new one would be constant."""
    architecture, arguments, size = model
    sizes: dict[str, Any] = {"img_size": size} if architecture[:8] != "convnext" else {}
    torch.manual_seed(3)
    module = timm.create_model(architecture, num_classes=num_classes, **arguments, **sizes)
    return {name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()}


def build(
    model: tuple[str, dict[str, Any], int],
    path: Path,
    *,
    num_classes: int = 3,
    channels: int = 3,
    **settings: Any,
) -> ModelBundle:
    architecture, arguments, size = model
    config = TimmConfig.model_validate(
        {"architecture": architecture, "arguments": arguments, "weights": str(path), **settings}
    )
    spec = InputSpec(channels, size, size, (0.5,) * channels, (0.5,) * channels)
    return config.build(num_classes=num_classes, input_spec=spec, seed=0)


def assert_loaded(bundle: ModelBundle, wanted: State, *, but: tuple[str, ...] = ("head.",)) -> None:
    loaded = bundle.module.state_dict()
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if not name.startswith(but):
            # Equal, but for tokens that a layout adds to positions: they are added up in float32.
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=1e-6, msg=name)


def npz_file(path: Path, state: State, *, layout: Any = jax_vit, **changes: Any) -> Path:
    arrays = layout(state, num_heads=2) | changes
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("layout", MODELS)
def test_a_published_layout_gives_the_tensors_it_was_made_from(layout: str, tmp_path: Path) -> None:
    state = source(MODELS[layout])
    path = tmp_path / "weights.pth.tar"
    torch.save(TORCH_LAYOUTS[layout](state), path)
    assert_loaded(build(MODELS[layout], path), state)


@pytest.mark.parametrize("layout", ["swin", "convnext", "eva-02", "ddp"])
def test_a_published_head_is_kept_if_asked_for(layout: str, tmp_path: Path) -> None:
    state = source(MODELS[layout])
    path = tmp_path / "weights.pth"
    torch.save(TORCH_LAYOUTS[layout](state), path, _use_new_zipfile_serialization=False)
    assert_loaded(build(MODELS[layout], path, head="keep", num_classes=5), state, but=("nothing",))
    with pytest.raises(ValueError, match=r"of another shape: head.*model.head=new"):
        build(MODELS[layout], path, head="keep")


@pytest.mark.parametrize("layout", ["clip", "dinov3"])
def test_safetensors_may_have_a_published_layout_too(layout: str, tmp_path: Path) -> None:
    state = source(MODELS[layout])
    path = tmp_path / "weights.safetensors"
    tensors = TORCH_LAYOUTS[layout](state)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    assert_loaded(build(MODELS[layout], path), state)


@pytest.mark.parametrize("layout", [jax_vit, jax_big_vision])
def test_googles_npz(layout: Any, tmp_path: Path) -> None:
    state = source(VIT)
    path = npz_file(tmp_path / "weights.npz", state, layout=layout)
    assert_loaded(build(VIT, path), state)
    assert_loaded(build(VIT, path, head="keep", num_classes=5), state, but=("nothing",))


def test_a_new_head_on_npz_weights_is_a_function_of_the_seed(tmp_path: Path) -> None:
    path = npz_file(tmp_path / "weights.npz", source(VIT))
    first, second = (build(VIT, path, num_classes=5).module.state_dict() for _ in range(2))
    assert torch.equal(first["head.weight"], second["head.weight"])
    assert not torch.equal(first["head.weight"], source(VIT)["head.weight"])


@pytest.mark.parametrize("kind", ["npz", "pth"])
def test_position_embeddings_of_another_grid_are_resampled_and_it_is_said(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = source(VIT)
    path = tmp_path / f"weights.{kind}"
    if kind == "npz":
        npz_file(path, state)
    else:
        torch.save(mae_encoder(state), path)
    bundle = build((*VIT[:2], 64), path)
    assert bundle.module.get_parameter("pos_embed").shape == (1, 17, 16)
    assert torch.equal(bundle.module.get_parameter("pos_embed")[:, :1], state["pos_embed"][:, :1])
    assert re.search(r"weights\.\w+: Resized position embedding: \(2, 2\) to \(4, 4\)", capfd.readouterr().err)


def test_tables_of_relative_positions_are_resampled_and_it_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = source(MODELS["swin"])
    path = tmp_path / "weights.pth"
    torch.save(swin(state), path)
    bundle = build(("swin_base_patch4_window7_224", {**SWIN, "window_size": 8}, 64), path)
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert bundle.module.get_parameter(table).shape == (225, 1)
    assert "3 tables of relative positions resampled" in capfd.readouterr().err


def test_what_is_left_out_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pth"
    torch.save(TORCH_LAYOUTS["mae with decoder"](source(VIT)), path)
    build(VIT, path)
    assert "6 tensors of the decoder left out" in capfd.readouterr().err


def test_grey_images_sum_the_first_convolution_over_colours(tmp_path: Path) -> None:
    state = source(VIT)
    for path in (tmp_path / "weights.pth", npz_file(tmp_path / "weights.npz", state)):
        if path.suffix == ".pth":
            torch.save(mae_encoder(state), path)
        loaded = build(VIT, path, channels=1).module.get_parameter("patch_embed.proj.weight")
        # Three float32 numbers of size 1, added in another order.
        torch.testing.assert_close(
            loaded, state["patch_embed.proj.weight"].sum(1, keepdim=True), rtol=0, atol=1e-6
        )


RECIPES = {
    "mae encoder": "mae",
    "mae with decoder": "mae",
    "moco v3": "mocov3",
    "dino training": "dino",
    "dinov2": None,
    "swin": None,
    "ddp": None,
}


@pytest.mark.parametrize(("layout", "recipe"), RECIPES.items())
def test_the_recipe_is_told_by_the_layout(layout: str, recipe: str | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(TORCH_LAYOUTS[layout](source(MODELS[layout])), path)
    assert recipe_of(path) == recipe


def test_deits_layout_is_told_from_maes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": source(VIT)}, path)
    assert recipe_of(path) == "deit"


# what is wrong → (layout of the file, its model, the model asked for, what is said)
MISFITS = {
    "missing": (
        lambda s: {n: t for n, t in s.items() if "blocks.1.mlp" not in n},
        VIT,
        VIT,
        r"4 missing: blocks\.1\.mlp\.fc1\.bias, .*",
    ),
    "unexpected": (lambda s: s | {"extra": torch.zeros(1)}, VIT, VIT, "1 unexpected: extra"),
    "another width": (
        lambda s: s,
        VIT,
        ("vit_base_patch16_224", {**TRANSFORMER, "embed_dim": 32}, 32),
        r"cls_token is \(1, 1, 16\) in the file, \(1, 1, 32\).*looks like a vision transformer 16 wide, 2 blocks",
    ),
    "swin for vit": (swin, MODELS["swin"], VIT, "the file looks like a Swin transformer, the model is a vision"),
    "vit for swin": (
        mae_encoder,
        VIT,
        MODELS["swin"],
        "looks like a vision transformer 16 wide, 2 blocks, patch",
    ),
    "convnext for vit": (TORCH_LAYOUTS["convnext"], MODELS["convnext"], VIT, "the file looks like a ConvNeXt"),
    "vit for convnext": (mae_encoder, VIT, MODELS["convnext"], "looks like a vision transformer"),
    "averaged tokens": (
        lambda s: {f"fc_{n}" if n.startswith("norm.") else n: t for n, t in s.items()},
        VIT,
        VIT,
        "set model.arguments.global_pool=avg",
    ),
    "no averaged tokens": (
        mae_encoder,
        VIT,
        ("vit_base_patch16_224", {**TRANSFORMER, "global_pool": "avg"}, 32),
        "set model.arguments.global_pool=token",
    ),
    "transformers": (
        lambda s: {"embeddings.cls_token": s["cls_token"], "encoder.layer.0.norm1.weight": s["norm.weight"]},
        VIT,
        VIT,
        "the file has transformers' layout",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_weights_that_do_not_fit_are_refused_with_what_they_are(what: str, tmp_path: Path) -> None:
    layout, theirs, ours, message = MISFITS[what]
    path = tmp_path / "weights.pth"
    torch.save(layout(source(theirs)), path)
    with pytest.raises(ValueError, match=rf"(?s)weights\.pth does not fit the model: .*{message}"):
        build(ours, path)


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({}, {"depth": 1}, "16 wide, 2 blocks, patch 16, the model is a vision transformer 16 wide, 1 blocks"),
        ({}, {"depth": 3}, "2 blocks, patch 16, the model is a vision transformer 16 wide, 3 blocks"),
        ({}, {"embed_dim": 32}, "the file is a vision transformer 16 wide"),
        ({}, {"init_values": 0.1}, r"4 missing: blocks\.0\.ls1\.gamma"),
        ({}, {"class_token": False, "global_pool": "avg"}, "1 unexpected: cls"),
        ({"MAPHead_0/probe": np.zeros((1, 1, 16), np.float32)}, {}, "1 unexpected: MAPHead_0/probe"),
        ({"Transformer/encoder_norm/bias": np.zeros(7, np.float32)}, {}, "size of tensor"),
    ],
)
def test_npz_weights_that_do_not_fit_are_refused(
    changes: dict[str, Any], asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = npz_file(tmp_path / "weights.npz", source(VIT), **changes)
    with pytest.raises(ValueError, match=message):
        build(("vit_base_patch16_224", {**TRANSFORMER, **asked}, 32), path)


def test_an_npz_array_that_is_not_there_is_named(tmp_path: Path) -> None:
    arrays = jax_vit(source(VIT), num_heads=2)
    del arrays["Transformer/encoderblock_1/LayerNorm_2/scale"]
    np.savez(tmp_path / "weights.npz", allow_pickle=False, **arrays)
    with pytest.raises(ValueError, match="missing: Transformer/encoderblock_1/LayerNorm_2/scale"):
        build(VIT, tmp_path / "weights.npz")


def test_npz_weights_of_a_kept_head_of_other_classes_are_refused(tmp_path: Path) -> None:
    path = npz_file(tmp_path / "weights.npz", source(VIT))
    with pytest.raises(ValueError, match=r"head\.weight.*the file's head has 5 classes.*model.head=new"):
        build(VIT, path, head="keep", num_classes=3)


def test_npz_weights_are_refused_for_models_that_timm_has_no_reader_for(tmp_path: Path) -> None:
    path = npz_file(tmp_path / "weights.npz", source(VIT))
    with pytest.raises(ValueError, match="VisionTransformer and ResNetV2, not for ConvNeXt"):
        build(MODELS["convnext"], path)
