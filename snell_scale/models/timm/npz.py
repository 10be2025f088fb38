"""Google's .npz weights (ViT of the IN-21k, augreg, SAM and big_vision releases, BiT) for timm's models."""

import re
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from snell_scale.interfaces import ModelBundle
from snell_scale.models.weight_files.fit import first, vision_transformer
from snell_scale.models.weight_files.reading import npz_shapes

# What a ViT's file holds; then what only some models have a place for. pre_logits is the representation layer of
# the first release, which nothing trained from it uses; conv_root, gn_root and block1… are the hybrids' stem.
_KNOWN = r"(embedding|Transformer|head|pre_logits|conv_root|gn_root|block\d+)/|pos_embedding$"
_OPTIONAL = {"cls_token": r"cls$", "attn_pool": r"MAPHead_0/"}


def load_npz(bundle: ModelBundle, path: Path, *, keep_head: bool) -> None:
    """Copy the arrays in by timm's own loader of the model, which resamples position embeddings.

    That loader neither says what it did not find a place for, nor what it did not find: here the file's depth and
    width are compared first, and every parameter is made NaN before and must be a number after.
    ValueError lists what does not fit.
    """
    module = cast(Any, bundle.module)
    shapes = npz_shapes(path)
    if not hasattr(module, "load_pretrained"):
        raise ValueError(
            f"model.weights: {path} is an .npz file, which timm reads for VisionTransformer and ResNetV2, "
            f"not for {type(module).__name__}; give a .safetensors or .pth file of this architecture"
        )
    _check_size(module, shapes, path)
    heads = {f"{name}." for name in bundle.head_modules}
    own_head = {
        name: tensor.clone() for name, tensor in module.state_dict().items() if name.startswith(tuple(heads))
    }
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    try:
        module.load_pretrained(str(path))
    except KeyError as error:
        raise ValueError(f"model.weights: {path} does not fit the model: 1 missing: {error.args[0]}") from error
    except (RuntimeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"model.weights: {path} does not fit the model: {error}") from error
    if not keep_head:
        module.load_state_dict(own_head, strict=False)
    empty = [name for name, parameter in module.named_parameters() if bool(parameter.isnan().any())]
    if empty:
        advice = "; if the classes differ, set model.head=new" if keep_head else ""
        raise ValueError(
            f"model.weights: {path} does not fit the model: {len(empty)} missing: {first(empty)}; the file's "
            f"head has {_classes(shapes)} classes{advice}"
        )


def _check_size(module: nn.Module, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """timm's loader reads as many blocks as the model has and leaves other arrays without a word."""
    depth = _depth(shapes)
    blocks = getattr(module, "blocks", None)
    kernel = next((shape for name, shape in shapes.items() if name.endswith("embedding/kernel")), None)
    if depth == 0 or blocks is None or kernel is None:
        return
    width = kernel[-1]
    own = module.state_dict()
    places = [_KNOWN, *(name for owner, name in _OPTIONAL.items() if getattr(module, owner, None) is not None)]
    place = re.compile(f"(opt/target/|params/img/|params/)?({'|'.join(places)})")
    unexpected = [name for name in shapes if not place.match(name)]
    if unexpected:
        raise ValueError(
            f"model.weights: {path} does not fit the model: {len(unexpected)} unexpected: {first(unexpected)}"
        )
    if (depth, width) != (len(blocks), own["patch_embed.proj.weight"].shape[0]):
        patch = f", patch {kernel[0]}" if len(kernel) == 4 else ""
        raise ValueError(
            f"model.weights: {path} does not fit the model: the file is a vision transformer {width} wide, "
            f"{depth} blocks{patch}, the model is {vision_transformer(own) or type(module).__name__}; change "
            "model.architecture or model.weights"
        )


def _depth(shapes: dict[str, tuple[int, ...]]) -> int:
    numbers = [re.search(r"encoderblock_(\d+)/", name) for name in shapes]
    found = {int(number[1]) for number in numbers if number}
    if found:
        return max(found) + 1
    # big_vision stacks all blocks along the first axis of each array.
    return next((s[0] for name, s in shapes.items() if name.endswith("encoderblock/LayerNorm_0/scale")), 0)


def _classes(shapes: dict[str, tuple[int, ...]]) -> int:
    return next((shape[-1] for name, shape in shapes.items() if name.endswith("head/bias")), 0)
