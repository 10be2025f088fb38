"""Segmentation models: shapes, sizes, counts against the literature, and what is refused."""

import copy
import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from snell_scale.models.segmentation.config import TimmSegmentationConfig
from tests.models.segmentation_parts import (
    NARROW,
    NUM_AUXILIARY,
    NUM_CLASSES,
    SMALL_SWIN,
    TINY,
    build,
    count,
    family,
    images,
    logits_of,
    loss_of,
    spec,
)


@family
def test_every_family_gives_logits_of_the_images_size_and_trains_whole(
    architecture: str, arguments: dict[str, Any], side: int, decoder: str
) -> None:
    bundle = build(architecture, arguments=arguments, side=side, decoder=decoder, **NARROW[decoder])
    assert bundle.output == "pixel_logits"
    outputs = logits_of(bundle.module.train(), images(2, side, side))
    assert len(outputs) == 1 + NUM_AUXILIARY[decoder]
    assert {tuple(logits.shape) for logits in outputs} == {(2, NUM_CLASSES, side, side)}
    loss_of(bundle.module, images(2, side, side)).backward()
    # What the features do not need is not there: DDP would wait for its gradient.
    assert [name for name, p in bundle.module.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        evaluated = bundle.module.eval()(images(1, side, side))
    assert evaluated.shape == (1, NUM_CLASSES, side, side)


@family
def test_the_bundle_adapts_the_backbone_and_trains_what_stands_on_it(
    architecture: str, arguments: dict[str, Any], side: int, decoder: str
) -> None:
    bundle = build(architecture, arguments=arguments, side=side, decoder=decoder, **NARROW[decoder])
    modules = dict(bundle.module.named_modules())
    parameters = dict(bundle.module.named_parameters())
    assert {*bundle.wrap_points, *bundle.head_modules} <= modules.keys()
    assert {*bundle.extra_trainable, *bundle.no_decay} <= parameters.keys()
    assert bundle.wrap_points
    assert all(name.startswith("backbone.") for name in bundle.wrap_points)
    assert "all" in bundle.target_groups
    for pattern in bundle.target_groups.values():
        matched = [name for name in modules if re.fullmatch(pattern, name)]
        assert matched
        assert all(name.startswith("backbone.") for name in matched)
    outside = {name.split(".")[0] for name in parameters} - {"backbone"}
    assert outside == set(bundle.head_modules)
    assert not any(name.startswith("backbone.head") for name in parameters)


@pytest.mark.parametrize("decoder", NARROW)
@pytest.mark.parametrize("size", [(12, 20), (28, 8), (16, 16)])
def test_a_vit_takes_any_multiple_of_its_patch(decoder: str, size: tuple[int, int]) -> None:
    module = build(decoder=decoder, **NARROW[decoder]).module.eval()
    assert module(images(2, *size)).shape == (2, NUM_CLASSES, *size)
    with pytest.raises(ValueError, match=r"18x16 pixels cannot be cut into patches of 4x4"):
        module(images(1, 18, 16))


def test_hierarchical_backbones_take_other_sizes_than_the_crop() -> None:
    swin = build(
        "swin_tiny_patch4_window7_224", arguments=SMALL_SWIN, side=64, decoder="upernet", **NARROW["upernet"]
    )
    assert swin.module.eval()(images(1, 44, 92)).shape == (1, NUM_CLASSES, 44, 92)
    convnext = build("test_convnext", side=64, decoder="upernet", **NARROW["upernet"])
    assert convnext.module.eval()(images(1, 45, 91)).shape == (1, NUM_CLASSES, 45, 91)


def test_a_vit_takes_crops_that_are_not_square() -> None:
    module = build(side=16, width=32).module.eval()
    assert module(images(1, 16, 32)).shape == (1, NUM_CLASSES, 16, 32)
    assert module.get_parameter("backbone.pos_embed").shape == (1, 1 + 4 * 8, 24)


def test_a_linear_decoder_sees_the_last_block_after_the_final_norm_and_no_class_token() -> None:
    module = build(decoder="linear").module.eval()
    backbone: Any = module.get_submodule("backbone")
    image = images(2, 16, 16)
    seen: list[Tensor] = []
    module.get_submodule("decoder").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][-1]))
    logits = module(image)
    tokens = backbone.forward_features(image)
    assert torch.equal(seen[0], tokens[:, 1:].transpose(1, 2).reshape(2, 24, 4, 4))
    conv = module.get_submodule("decoder.classifier.1")
    expected = nn.functional.interpolate(conv(seen[0]), scale_factor=4, mode="bilinear", align_corners=False)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("decoder", "depth", "expected"),
    [
        ("linear", 24, [23]),
        ("setr_pup", 24, [9, 14, 19, 23]),
        ("upernet", 24, [5, 11, 17, 23]),
        ("upernet", 12, [2, 5, 8, 11]),
        ("setr_pup", 1, [0, 0, 0, 0]),
    ],
)
def test_maps_come_from_the_published_blocks(decoder: str, depth: int, expected: list[int]) -> None:
    bundle = build(arguments={**TINY, "depth": depth}, decoder=decoder, **NARROW[decoder])
    blocks: list[Any] = []
    for name in bundle.wrap_points:
        bundle.module.get_submodule(name).register_forward_hook(lambda _, __, output: blocks.append(output))
    backbone = bundle.module.get_submodule("backbone").eval()
    maps = backbone(images(1, 16, 16))
    tokens = [output[:, 1:] for output in blocks]
    if decoder == "linear":
        tokens = [backbone.get_submodule("norm")(output)[:, 1:] for output in blocks]
    assert len(blocks) == depth
    found = [next(i for i, t in enumerate(tokens) if torch.equal(m.flatten(2).mT, t)) for m in maps]
    assert found == expected


def test_chosen_maps_leave_out_the_blocks_after_them() -> None:
    bundle = build(decoder="setr_pup", indices=[0, 1, 1, 3], **NARROW["setr_pup"])
    assert bundle.wrap_points == tuple(f"backbone.blocks.{i}" for i in range(4))
    assert bundle.module.eval()(images(1, 16, 16)).shape == (1, NUM_CLASSES, 16, 16)


def test_a_map_that_the_backbones_norm_is_not_made_for_gets_one_of_its_own() -> None:
    settings: dict[str, Any] = {"arguments": SMALL_SWIN, "side": 64}
    early = build("swin_tiny_patch4_window7_224", indices=[1], **settings).module
    assert early.get_parameter("pyramid.norms.0.weight").shape == (32,)
    assert build("swin_tiny_patch4_window7_224", indices=[3], **settings).module.pyramid is None


# Millions in all: SETR-PUP on ViT-L with its three auxiliary heads, "317-318" in the literature: 304.1 of the
# encoder (1.05 of them position embeddings of a 512² crop), 4.2 of the decoder, 3 x 3.0 of the heads; no class
# head and no final norm. UPerNet with its auxiliary head as published by Swin (121) and ConvNeXt (122).
LITERATURE = [
    ("vit_large_patch16_224", "setr_pup", 512, 150, 317.5, 0.5),
    ("swin_base_patch4_window7_224", "upernet", 512, 150, 121, 0.5),
    ("convnext_base", "upernet", 512, 150, 122, 0.5),
]


@pytest.mark.parametrize(("architecture", "decoder", "side", "num_classes", "millions", "off"), LITERATURE)
def test_parameter_counts_are_those_of_the_literature(
    architecture: str, decoder: str, side: int, num_classes: int, millions: float, off: float
) -> None:
    config = TimmSegmentationConfig.model_validate({"architecture": architecture, "decoder": decoder})
    with torch.device("meta"):
        module = config.build(num_classes=num_classes, input_spec=spec(side), seed=0).module
    assert count(module) / 1e6 == pytest.approx(millions, abs=off)


def test_parts_of_setr_pup_on_vit_large() -> None:
    config = TimmSegmentationConfig(architecture="vit_large_patch16_224", decoder="setr_pup")
    with torch.device("meta"):
        module = config.build(num_classes=150, input_spec=spec(512), seed=0).module
    vit_without_head, final_norm, positions = 303_301_632, 2 * 1024, (32 * 32 - 14 * 14) * 1024
    assert count(module.get_submodule("backbone")) == vit_without_head - final_norm + positions
    conv, later, norm, classifier = 9 * 1024 * 256, 9 * 256 * 256, 2 * 256, 257 * 150
    assert count(module.get_submodule("decoder")) == 2 * 1024 + conv + 3 * later + 4 * norm + classifier
    head = 2 * 1024 + conv + later + 2 * norm + classifier
    assert count(module.get_submodule("auxiliary")) == 3 * head
    assert count(module) == 317_291_096


def test_a_copy_computes_with_its_own_weights() -> None:
    """The backbone's forward is bound to the module; a copy's must not be bound to the original."""
    module = build().module.eval()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert not module(images(1, 16, 16)).any()
    assert twin(images(1, 16, 16)).any()


def test_the_seed_alone_decides_the_initial_weights() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(seed=5, decoder="setr_pup", **NARROW["setr_pup"]).module.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build(seed=5, decoder="setr_pup", **NARROW["setr_pup"]).module.state_dict()
    other = build(seed=6, decoder="setr_pup", **NARROW["setr_pup"]).module.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    for part in ("backbone", "decoder", "auxiliary"):
        assert any(not torch.equal(first[key], other[key]) for key in first if key.startswith(part))


def test_options_reach_what_they_name() -> None:
    bundle = build(decoder="linear", batch_norm=True, drop_path=0.2, dropout=0.3)
    modules = dict(bundle.module.named_modules())
    assert isinstance(modules["decoder.norm"], nn.BatchNorm2d)
    assert getattr(modules["decoder.classifier.0"], "p", None) == 0.3
    assert getattr(modules["backbone.blocks.4.drop_path1"], "drop_prob", None) == pytest.approx(0.2)
    without = build(decoder="upernet", auxiliary=False, **NARROW["upernet"])
    assert without.head_modules == ("pyramid", "decoder")
    assert isinstance(without.module.train()(images(2, 16, 16)), Tensor)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"decoder": "linear", "channels": 8}, "decoder=linear has none"),
        ({"decoder": "upernet", "batch_norm": True}, "batch_norm is for decoder=linear"),
        ({"decoder": "upernet", "indices": [0, 1]}, "indices has 2 entries, upernet takes 4"),
        ({"decoder": "upernet", "indices": [0, 2, 1, 3]}, "earliest map first: sort them"),
        ({"arguments": {"drop_path_rate": 0.1}}, "set model.drop_path"),
        ({"arguments": {"img_size": 32}}, "img_size.*follow from the data: remove them"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TimmSegmentationConfig.model_validate({"architecture": "test_vit", **keys})


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"decoder": "setr_pup"},
            "strides 4, 8, 16, 32; set model.decoder=upernet",
        ),
        ("resnet18", {"decoder": "setr_pup"}, "stands on a plain ViT"),
        (
            "vit_tiny_patch16_224",
            {"indices": [12]},
            r"model.indices has \[12\].*12 feature maps count from 0 to 11",
        ),
        ("levit_128", {"decoder": "upernet"}, "upernet, which takes 4 maps, but levit_128 has 3; set .*=linear"),
        ("vit_tny_patch16_224", {}, "did you mean vit_tiny_patch16_224"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(architecture: str, keys: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(architecture, side=64, **keys)


def test_the_label_names_backbone_and_decoder() -> None:
    config = TimmSegmentationConfig(architecture="vit_base_patch16_224", decoder="upernet")
    assert config.describe() == "vit_base_patch16_224 + upernet"
