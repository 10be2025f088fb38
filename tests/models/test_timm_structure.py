"""Blocks, targets and heads that are read off timm models of several families."""

import re

import pytest
import torch

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.timm.config import TimmConfig

COLOUR = (3, (0.5,) * 3, (0.5,) * 3)


def on_meta(architecture: str, size: int) -> ModelBundle:
    channels, mean, std = COLOUR
    with torch.device("meta"):
        config = TimmConfig(architecture=architecture)
        return config.build(num_classes=10, input_spec=InputSpec(channels, size, size, mean, std), seed=0)


def matched(bundle: ModelBundle, group: str) -> list[str]:
    pattern = bundle.target_groups[group]
    return [name for name, _ in bundle.module.named_modules() if re.fullmatch(pattern, name)]


def test_vit_base() -> None:
    bundle = on_meta("vit_base_patch16_224", 224)
    assert bundle.wrap_points == tuple(f"blocks.{i}" for i in range(12))
    layers = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert set(matched(bundle, "all")) == {f"blocks.{i}.{layer}" for i in range(12) for layer in layers}
    assert {name.split(".")[2] for name in matched(bundle, "attention")} == {"attn"}
    assert {name.split(".")[2] for name in matched(bundle, "mlp")} == {"mlp"}
    assert bundle.fused_groups == {"qkv": 3}
    assert bundle.head_modules == ("head",)
    assert bundle.extra_trainable == ("cls_token",)
    assert bundle.no_decay == {"cls_token", "pos_embed"}


@pytest.mark.parametrize(
    ("architecture", "size", "num_blocks", "num_targets", "head"),
    [
        # 2 convolutions in each of 8 blocks and 3 downsampling ones
        ("resnet18", 64, 8, 19, ("fc",)),
        # 2 in each of 12 MLPs and 3 downsampling ones; the depthwise convolutions are grouped
        ("convnext_atto", 64, 12, 27, ("head.fc",)),
        # 4 in each of 12 blocks and 3 patch mergers
        ("swin_tiny_patch4_window7_224", 224, 12, 51, ("head.fc",)),
        ("deit_tiny_distilled_patch16_224", 224, 12, 48, ("head", "head_dist")),
        ("vit_huge_patch14_224", 224, 32, 128, ("head",)),
        ("vit_large_patch16_224.mae", 224, 24, 96, ("head",)),
        ("vit_huge_patch14_clip_224.laion2b", 224, 32, 128, ("head",)),
        ("vit_base_patch14_dinov2", 518, 12, 48, ("head",)),
        ("vit_giant_patch14_reg4_dinov2", 518, 40, 160, ("head",)),
        ("vit_large_patch16_dinov3", 256, 24, 96, ("head",)),
        ("swin_base_patch4_window7_224", 224, 24, 99, ("head.fc",)),
        ("convnext_base", 224, 36, 75, ("head.fc",)),
        ("eva_giant_patch14_224", 224, 40, 160, ("head",)),
        # q, k and v apart, and a gated MLP of three layers
        ("eva02_large_patch14_448", 448, 24, 168, ("head",)),
        # blocks with their norms behind
        ("eva02_enormous_patch14_clip_224", 224, 64, 256, ("head",)),
        # without the MLPs that make its tables of position biases
        ("swinv2_base_window8_256", 256, 24, 99, ("head.fc",)),
        # lists of classifiers, one per branch; a second one whose scores are added to the first's
        ("crossvit_9_240", 240, 3, 3 * (4 * 4 + 2 + 2 * 4 + 2), ("head.0", "head.1")),
        # … after 4 blocks of outlook attention, a convolution, 14 of self-attention, 2 of class attention
        ("volo_d1_224", 224, 20, 4 * 5 + 1 + 14 * 4 + 2 * 5, ("aux_head", "head")),
    ],
)
def test_other_families(
    architecture: str, size: int, num_blocks: int, num_targets: int, head: tuple[str, ...]
) -> None:
    bundle = on_meta(architecture, size)
    assert len(bundle.wrap_points) == num_blocks
    names = matched(bundle, "all")
    assert len(names) == num_targets
    assert not any("patch_embed" in name or "stem" in name or name == "conv1" for name in names)
    assert bundle.head_modules == head
    sizes = [getattr(bundle.module.get_submodule(name), "groups", 1) for name in names]
    assert set(sizes) == {1}


def test_a_pattern_matches_no_module_that_was_not_meant() -> None:
    """In a resnet with average-pooled downsampling, downsample.0 is no convolution while conv1.0 is the stem."""
    bundle = on_meta("resnet26d", 64)
    kinds = {type(bundle.module.get_submodule(name)).__name__ for name in matched(bundle, "all")}
    assert kinds == {"Conv2d"}
    assert not any(name.startswith("conv1") for name in matched(bundle, "all"))


def test_groups_of_swin() -> None:
    bundle = on_meta("swin_base_patch4_window7_224", 224)
    assert {name.split(".")[-1] for name in matched(bundle, "attention")} == {"qkv", "proj"}
    assert {name.split(".")[-1] for name in matched(bundle, "mlp")} == {"fc1", "fc2"}
    mergers = [f"layers.{i}.downsample.reduction" for i in (1, 2, 3)]
    grouped = {*matched(bundle, "attention"), *matched(bundle, "mlp")}
    assert [name for name in matched(bundle, "all") if name not in grouped] == mergers


def test_groups_of_convnext() -> None:
    bundle = on_meta("convnext_base", 224)
    assert "attention" not in bundle.target_groups
    assert {name.split(".")[-1] for name in matched(bundle, "linear")} == {"fc1", "fc2"}
    mergers = [f"stages.{i}.downsample.1" for i in (1, 2, 3)]
    assert set(matched(bundle, "all")) == {*matched(bundle, "linear"), *mergers}


@pytest.mark.parametrize(
    ("architecture", "size", "fused"),
    [
        ("vit_giant_patch14_dinov2", 518, {"qkv": 3, "fc1": 2}),
        ("vit_base_patch16_siglip_224", 224, {"qkv": 3, "kv": 2}),
        # q, k and v of a head lie together
        ("tiny_vit_5m_224", 224, {}),
        ("coatnet_0_rw_224", 224, {}),
    ],
)
def test_stacked_matrices_are_told_from_interleaved_ones(
    architecture: str, size: int, fused: dict[str, int]
) -> None:
    assert dict(on_meta(architecture, size).fused_groups) == fused
