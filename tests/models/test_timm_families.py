"""Every named family of timm, tiny: each adapted layer is called, gets a gradient and merges to equal outputs."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.timm.config import TimmConfig
from snell_scale.models.timm.structure import bundle_of
from snell_scale.tuners import SnellConfig
from snell_scale.tuners.snell import SnellLayer

TRANSFORMER = {"embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
DAVIT = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 2, 2, 2]}
CROSSVIT = {"embed_dim": [8, 16], "depth": [[1, 1, 0]], "num_heads": [2, 2], "mlp_ratio": [2, 2, 1]}

# architecture → (arguments, pixels, matrices adapted, fused_groups)
FAMILIES: dict[str, tuple[dict[str, Any], int, int, dict[str, int]]] = {
    "vit_base_patch16_224": (TRANSFORMER, 32, 2 * 6, {"qkv": 3}),
    "vit_base_patch16_clip_224": (TRANSFORMER, 32, 2 * 6, {"qkv": 3}),
    # the pooling attention has q, kv, proj and an MLP
    "vit_base_patch16_siglip_224": (TRANSFORMER, 32, 2 * 6 + 6, {"qkv": 3, "kv": 2}),
    "vit_base_patch14_dinov2": (TRANSFORMER, 28, 2 * 6, {"qkv": 3}),
    "vit_giant_patch14_dinov2": ({**TRANSFORMER, "embed_dim": 24}, 28, 2 * 7, {"qkv": 3, "fc1": 2}),
    "vit_base_patch16_dinov3": (TRANSFORMER, 32, 2 * 6, {"qkv": 3}),
    "vit_huge_plus_patch16_dinov3": (TRANSFORMER, 32, 2 * 7, {"qkv": 3}),
    "deit_tiny_distilled_patch16_224": (TRANSFORMER, 32, 2 * 6, {"qkv": 3}),
    "eva02_tiny_patch14_224": (TRANSFORMER, 28, 2 * 7, {"qkv": 3, "fc1": 2}),
    "eva02_large_patch14_448": (TRANSFORMER, 28, 2 * 7, {}),
    "eva_giant_patch14_224": (TRANSFORMER, 28, 2 * 6, {"qkv": 3}),
    "beitv2_base_patch16_224": (TRANSFORMER, 32, 2 * 6, {"qkv": 3}),
    # and one patch merger
    "swin_base_patch4_window7_224": (SWIN, 32, 3 * 6 + 1, {"qkv": 3}),
    "swinv2_base_window8_256": (SWIN, 32, 3 * 6 + 1, {"qkv": 3}),
    # 2 linear layers in each of 5 blocks and 3 downsampling convolutions
    "convnext_base": ({"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}, 64, 5 * 2 + 3, {}),
    "convnextv2_base": ({"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}, 64, 5 * 2 + 3, {}),
    "test_resnet": ({}, 64, 12, {}),
    # one number for its patches' size; two blocks of class attention with q, k and v apart
    "xcit_nano_12_p16_224": (TRANSFORMER, 32, 2 * 6 + 2 * 6, {"qkv": 3}),
    # without the convolutions between its stages, whose kernel_size it reads
    "davit_tiny": (DAVIT, 64, 8 * 6, {"qkv": 3}),
    # two branches with a classifier each
    "crossvit_9_240": (CROSSVIT, 240, 2 * 6 + 2 * (1 + 4 + 1), {"qkv": 3}),
    # without the tables of its gated positions
    "convit_tiny": ({**TRANSFORMER, "local_up_to_layer": 1}, 32, 2 * 6, {"qk": 2, "qkv": 3}),
}


def tiny(architecture: str) -> ModelBundle:
    arguments, size, _, _ = FAMILIES[architecture]
    config = TimmConfig(architecture=architecture, arguments=arguments)
    spec = InputSpec(3, size, size, (0.5,) * 3, (0.5,) * 3)
    bundle = config.build(num_classes=4, input_spec=spec, seed=0)
    # Layer scale of 1e-5, and norms that start at 0, would hide what a layer does.
    for name, parameter in bundle.module.named_parameters():
        if parameter.ndim == 1 and not name.endswith("bias") and parameter.abs().max() < 1e-4:
            nn.init.ones_(parameter)
    return bundle


def images(bundle: ModelBundle) -> Tensor:
    spec = bundle.input_spec
    return torch.randn(2, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_adapted_matrix_gets_a_gradient_and_merging_changes_nothing(
    architecture: str, tmp_path: Path
) -> None:
    bundle = tiny(architecture)
    _, _, num_matrices, fused = FAMILIES[architecture]
    assert dict(bundle.fused_groups) == fused
    config = SnellConfig(
        r=2,
        sparsity=0.2,
        target_modules=bundle.target_groups["all"],
        fused_groups=dict(bundle.fused_groups),
        init_weights=False,
    )
    x = images(bundle)
    before = bundle.module.double().eval()(x)
    plain = copy.deepcopy(bundle.module)
    torch.manual_seed(0)  # of the factors
    model = get_peft_model(bundle.module, config).eval()
    output = model(x)
    # Far above float64's rounding, and of what timm's small heads give.
    assert (output - before).abs().max() > 1e-4 * before.abs().max()
    # Squared, for the sum of what a norm puts out is a constant.
    (output.square().sum() + output.sum()).backward()
    factors = {
        (name, kind): getattr(layer, kind)["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, SnellLayer)
        for kind in ("snell_A", "snell_B")
    }
    assert sum(len(factor) for factor in factors.values()) == 2 * num_matrices
    for key, factor in factors.items():
        assert factor.grad is not None, key
        assert all(group.abs().max() > 0 for group in factor.grad), key
    model.save_pretrained(str(tmp_path))
    torch.testing.assert_close(PeftModel.from_pretrained(plain, str(tmp_path)).eval()(x), output, rtol=0, atol=0)
    merged = model.merge_and_unload()
    # float64 sums in another order; the outputs are of size 1.
    torch.testing.assert_close(merged(x), output, rtol=1e-9, atol=1e-9)


def test_a_fused_qkv_that_eva_reads_past_the_layer_is_made_to_be_called() -> None:
    """The function stays the same: timm's own forward with the weight read directly gives the same output."""
    arguments, size, _, _ = FAMILIES["eva_giant_patch14_224"]
    module = timm.create_model("eva_giant_patch14_224", img_size=size, num_classes=4, **arguments).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    called: list[str] = []
    module.get_submodule("blocks.0.attn.qkv").register_forward_hook(lambda *_: called.append("qkv"))
    before = module(x)
    assert not called
    bundle_of(module, InputSpec(3, size, size, (0.5,) * 3, (0.5,) * 3))
    torch.testing.assert_close(module(x), before, rtol=1e-12, atol=1e-12)
    assert called


@pytest.mark.parametrize("architecture", [name for name in timm.list_models("test_*") if "naflex" not in name])
def test_every_target_is_called(architecture: str) -> None:
    """timm's own tiny models, one of each of many more families: no layer is passed by."""
    bundle = TimmConfig(architecture=architecture).build(
        num_classes=4, input_spec=InputSpec(3, 160, 160, (0.5,) * 3, (0.5,) * 3), seed=0
    )
    targets = [n for n, _ in bundle.module.named_modules() if re.fullmatch(bundle.target_groups["all"], n)]
    called: set[str] = set()
    for name in targets:
        bundle.module.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        bundle.module.eval()(torch.randn(1, 3, 160, 160))
    assert called == set(targets)
