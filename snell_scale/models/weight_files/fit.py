"""Whether weights fit a model: what is missing, unexpected or of another shape, and what they look like."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from torch import Tensor

_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1536: "giant"}


def mismatches(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """One phrase per kind of problem, with its count and first names; empty where the two fit."""
    shapes = [
        f"{name} is {tuple(saved[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in saved and own[name].shape != saved[name].shape
    ]
    listed = {"missing": sorted(own.keys() - saved.keys()), "unexpected": sorted(saved.keys() - own.keys())}
    names = [f"{len(keys)} {kind}: {first(keys)}" for kind, keys in listed.items() if keys]
    return names + ([f"{len(shapes)} of another shape: {first(shapes)}"] if shapes else [])


def refuse(
    path: Path,
    problems: Sequence[str],
    *,
    own: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    keep_head: bool,
) -> NoReturn:
    """ValueError with the problems and, where it can be told, what the file is and what to change."""
    advice = _advice(own, saved)
    if keep_head:
        advice.append("if the classes differ, set model.head=new")
    told = f"; {'; '.join(advice)}" if advice else ""
    raise ValueError(f"model.weights: {path} does not fit the model: {'; '.join(problems)}{told}")


def without(tensors: Mapping[str, Tensor], modules: Sequence[str]) -> dict[str, Tensor]:
    """The tensors that lie below none of `modules`."""
    below = tuple(f"{name}." for name in modules)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(below)}


def first(items: Sequence[str]) -> str:
    """The first five, for a message."""
    return ", ".join(items[:5]) + (", …" if len(items) > 5 else "")


def vision_transformer(tensors: Mapping[str, Tensor]) -> str | None:
    """ "a vision transformer 768 wide, 12 blocks, patch 16 (vit_base_patch16)", where the names say so."""
    patches = tensors.get("patch_embed.proj.weight")
    depth = 1 + max(
        (int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if m), default=-1
    )
    if patches is None or patches.ndim != 4 or not depth:
        return None
    width, _, _, patch = patches.shape
    name = f" (vit_{_WIDTHS[width]}_patch{patch}…)" if width in _WIDTHS else ""
    return f"a vision transformer {width} wide, {depth} blocks, patch {patch}{name}"


def _advice(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    if any(re.match(r"(vit\.|dinov2\.|model\.)?(embeddings|encoder\.layer)\.", name) for name in saved):
        return ["the file has transformers' layout: take the model's original file, or timm's"]
    if "visual.trunk.blocks.0.norm1.weight" not in saved and any("text_model." in name for name in saved):
        return ["the file has transformers' layout of CLIP: take open_clip's file of the model"]
    if "fc_norm.weight" in saved and "fc_norm.weight" not in own and "norm.weight" in own:
        return ["the file has fc_norm, so its tokens are averaged: set model.arguments.global_pool=avg"]
    if "fc_norm.weight" in own and "fc_norm.weight" not in saved and "norm.weight" in saved:
        return ["the file has norm in place of fc_norm: set model.arguments.global_pool=token"]
    kinds = {
        "a Swin transformer": r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table",
        "a ConvNeXt": r"(stages\.\d+\.\d+\.dwconv|stages\.\d+\.blocks\.\d+\.conv_dw)\.",
        "a ResNet": r"layer1\.0\.(conv1|bn1)\.",
        "an EVA or DINOv3": r"blocks\.0\.attn\.q_bias|storage_tokens",
        "a CLIP": r"visual\.",
    }
    found = [vision_transformer(saved), *(_if_any(saved, what, names) for what, names in kinds.items())]
    looks = next((what for what in found if what), None)
    mine = vision_transformer(own)
    if looks is None or looks == mine:
        return []
    return [f"the file looks like {looks}" + (f", the model is {mine}" if mine else "")]


def _if_any(tensors: Mapping[str, Tensor], what: str, names: str) -> str | None:
    return what if any(re.match(names, name) for name in tensors) else None
