"""CLIPs of open_clip: what a build gives, which layers are targets, and what cannot be built."""

import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any, cast

import open_clip
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from snell_scale.interfaces import ModelBundle
from snell_scale.models.open_clip.config import OpenClipConfig
from snell_scale.models.open_clip.settings import image_size, named_settings
from snell_scale.tuners.methods.base import matching_modules
from tests.models.clip_cases import SMALL, SPEC, build, pairs, small, tune

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BLOCK = ("attn", "mlp.c_fc", "mlp.c_proj")


def targets(bundle: ModelBundle, group: str = "all") -> list[str]:
    return matching_modules(bundle.module, bundle.target_groups[group])


def block_targets(prefixes: Sequence[str], names: Sequence[str] = BLOCK) -> list[str]:
    return [
        f"{prefix}transformer.resblocks.{i}.{name}" for prefix in prefixes for i in range(2) for name in names
    ]


def on_meta(architecture: str, **settings: Any) -> ModelBundle:
    height, width = image_size(named_settings(architecture)["vision_cfg"])
    spec = dataclasses.replace(SPEC, height=height, width=width)
    with torch.device("meta"):
        return OpenClipConfig(architecture=architecture, **settings).build(num_classes=0, input_spec=spec, seed=0)


def test_forward_gives_what_the_contract_says() -> None:
    bundle = build()
    images, texts = pairs(0)
    image, text, scale = bundle.module(images, texts)
    assert image.shape == text.shape == (4, 16)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(4))
    assert scale.shape == ()
    assert scale.item() == pytest.approx(1 / 0.07)
    only_image, none, _ = bundle.module(image=images)
    assert none is None
    assert torch.equal(only_image, image)
    none, only_text, _ = bundle.module(text=texts)
    assert none is None
    assert torch.equal(only_text, text)
    assert bundle.output == "image_text_features"


def test_it_computes_what_open_clips_own_model_does() -> None:
    bundle, images = build(), pairs(0)
    plain = open_clip.CLIP(**SMALL).eval()
    plain.load_state_dict(bundle.module.state_dict())  # torch takes a scale of one dimension for one of none
    for found, expected in zip(bundle.module.eval()(*images), plain(*images), strict=True):
        assert torch.equal(found, expected)


def test_the_bundle_of_a_small_clip() -> None:
    bundle = build()
    assert bundle.wrap_points == tuple(
        f"{prefix}transformer.resblocks.{i}" for prefix in ("visual.", "") for i in range(2)
    )
    assert targets(bundle) == block_targets(("visual.", ""))
    assert targets(bundle, "attention") == block_targets(("visual.", ""), BLOCK[:1])
    assert targets(bundle, "mlp") == targets(bundle, "linear") == block_targets(("visual.", ""), BLOCK[1:])
    assert targets(bundle, "image") == block_targets(("visual.",))
    assert targets(bundle, "text") == block_targets(("",))
    assert bundle.extra_trainable == ("logit_scale",)
    assert bundle.head_modules == ()
    assert bundle.no_decay == {
        "logit_scale", "positional_embedding", "visual.positional_embedding", "visual.class_embedding",
    }  # fmt: skip


@pytest.mark.parametrize(("towers", "prefix"), [("image", "visual."), ("text", "")])
def test_one_tower_leaves_the_other_as_it_is(towers: Any, prefix: str) -> None:
    bundle = build(towers=towers)
    assert targets(bundle) == block_targets((prefix,))
    assert "attention" in bundle.target_groups
    assert {"image", "text"} & bundle.target_groups.keys() == {towers}
    trainable = {name for name, p in bundle.module.named_parameters() if p.requires_grad}
    assert "logit_scale" in trainable
    inside = {
        name for name, _ in bundle.module.named_parameters() if name.startswith("visual.") == (towers == "image")
    }
    assert trainable == inside | {"logit_scale"}


def test_the_seed_alone_decides_the_initial_weights() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (
        small().build(num_classes=0, input_spec=SPEC, seed=seed).module.state_dict() for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_preprocessing_is_open_clips() -> None:
    arguments = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "vocab_size": 49408}}
    found = small(arguments=arguments).preprocessing()
    assert found.image is not None
    assert (found.image.channels, found.image.height, found.image.width) == (3, 8, 8)
    assert (found.image.mean, found.image.std, found.image.interpolation) == (*OPENAI, "bicubic")
    assert found.tokenize is not None
    captions = ["a photo of the digit three", "x", "one two three four five six seven eight nine"]
    tokens = pickle.loads(pickle.dumps(found.tokenize))(captions)  # as a worker process gets it
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, open_clip.SimpleTokenizer(context_length=8)(captions))
    assert tokens[0].tolist()[:2] == [49406, 320]  # start of text, "a"
    assert tokens[2, -1] == 49407  # cut, it still ends


def test_a_named_architecture_has_its_own_size_and_tokenizer() -> None:
    found = OpenClipConfig(architecture="ViT-L-14-336").preprocessing()
    assert found.image is not None
    assert (found.image.height, found.image.width) == (336, 336)
    assert found.tokenize is not None
    assert found.tokenize(["a cat"]).shape == (1, 77)


def test_tokens_that_the_text_tower_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 64, but .* up to 49407: set it to at least 49408"):
        small().preprocessing()


def test_an_absent_tokenizer_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise OSError("no connection")

    monkeypatch.setattr(open_clip, "get_tokenizer", absent)
    with pytest.raises(
        ValueError, match="ViT-B-16-SigLIP needs timm/ViT-B-16-SigLIP from the hub: no connection"
    ):
        OpenClipConfig(architecture="ViT-B-16-SigLIP").preprocessing()


@pytest.mark.parametrize(
    ("architecture", "parameters", "blocks", "widths"),
    [
        ("ViT-L-14", 427_616_513, 24 + 12, {1024: 24, 768: 12}),
        ("ViT-H-14", 986_109_441, 32 + 24, {1280: 32, 1024: 24}),
        ("ViT-bigG-14", 2_539_567_105, 48 + 32, {1664: 48, 1280: 32}),
    ],
)
def test_published_sizes(architecture: str, parameters: int, blocks: int, widths: dict[int, int]) -> None:
    bundle = on_meta(architecture)
    assert sum(p.numel() for p in bundle.module.parameters()) == parameters
    assert len(bundle.wrap_points) == blocks
    assert len(targets(bundle)) == 3 * blocks
    attention = tune(bundle, "snell", targets="attention", r=32)
    # Four matrices of E × E a block, each with factors of r (E + E).
    assert attention.num_trainable() == sum(count * 4 * 32 * 2 * width for width, count in widths.items())


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("RN50", {"visual.layer1.0.conv1", "visual.layer1.0.downsample.0", "transformer.resblocks.0.attn"}),
        ("convnext_base", {"visual.trunk.stages.0.blocks.0.mlp.fc1", "transformer.resblocks.0.attn"}),
        ("ViT-B-16-SigLIP", {"visual.trunk.blocks.0.attn.qkv", "text.transformer.resblocks.0.attn"}),
        ("EVA02-E-14", {"visual.trunk.blocks.0.mlp.fc1", "text.transformer.resblocks.0.attn"}),
    ],
)
def test_towers_of_other_kinds(architecture: str, expected: set[str]) -> None:
    bundle = on_meta(architecture)
    found = targets(bundle)
    assert expected <= set(found)
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    assert all(isinstance(bundle.module.get_submodule(name), kinds) for name in found)
    own = [name for name in found if not name.startswith("visual.trunk")]  # timm's rules are tested with timm
    assert all(name.startswith(tuple(f"{block}." for block in bundle.wrap_points)) for name in own)
    assert not any("attnpool" in name or "stem" in name or name.startswith("visual.head") for name in found)
    assert len({block.split(".")[0] for block in bundle.wrap_points}) == 2
    if architecture in ("ViT-B-16-SigLIP", "EVA02-E-14"):
        assert bundle.fused_groups["qkv"] == 3
    assert set(targets(bundle, "image")) | set(targets(bundle, "text")) == set(found)


def test_a_sigmoid_model_gives_three_outputs_too() -> None:
    arguments = {**SMALL, "custom_text": True, "init_logit_bias": -10.0}
    bundle = build(arguments=arguments)
    assert len(bundle.module(*pairs(0))) == 3
    assert not cast(Any, bundle.module).logit_bias.requires_grad
    assert targets(bundle) == block_targets(("visual.", "text."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "ViT-L-41", "arguments": {}}, r"did you mean [^?]*ViT-L-14[ ?]"),
        ({"architecture": "vit-l-14", "arguments": {}}, "did you mean ViT-L-14"),
        ({"architecture": "coca_ViT-B-32", "arguments": {}}, "a CoCa, which writes captions besides"),
        ({"arguments": {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 10}}}, "8x8 .* takes 10x10"),
        ({"arguments": {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "patch_size": 3}}}, "patches of 3 pixels"),
        (
            {"arguments": {**SMALL, "text_cfg": {**SMALL["text_cfg"], "heads": 3}}},
            "refuses to build CLIP.*divisible",
        ),
        ({"architecture": "ViT-L-14", "arguments": {}, "weights": "pretrained:openay"}, "did you mean 'openai'"),
        ({"architecture": "ViT-L-14", "arguments": {}, "weights": "pretrained:openai"}, "ViT-L-14-quickgelu"),
        (
            {"architecture": "ViT-L-14-quickgelu", "arguments": {}, "weights": "pretrained:laion2b_s32b_b82k"},
            "has no weights of ViT-L-14-quickgelu tagged 'laion2b_s32b_b82k'.*It has: openai",
        ),
    ],
)
def test_what_cannot_be_built_says_why(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arguments": {}}, "lacks embed_dim, vision_cfg, text_cfg"),
        ({"arguments": {**SMALL, "embed_dimm": 3}}, "did you mean 'embed_dim'"),
        (
            {"arguments": {**SMALL, "vision_cfg": {"widht": 3}}},
            "arguments.vision_cfg has 'widht': did you mean 'width'",
        ),
        ({"arguments": {**SMALL, "text_cfg": 64}}, "arguments.text_cfg is 64, expected a mapping"),
        ({"architecture": "ViT-L-14", "arguments": SMALL}, "arguments are for architecture=custom alone"),
        ({"tag": "openai"}, "tag belongs to weights from a file"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small(**settings)


def test_grey_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 channel\(s\), and CLIP's image towers take 3: set data.channels=3"):
        small().build(num_classes=0, input_spec=dataclasses.replace(SPEC, channels=1), seed=0)


def test_labels() -> None:
    assert OpenClipConfig(architecture="ViT-H-14").describe() == "ViT-H-14"
    assert small(towers="image").describe() == "CLIP(width=32/32), image tower"
