"""What a tuner and an engine must know of a CLIP of open_clip, read off the model: blocks, targets, towers."""

import re
from collections.abc import Callable
from typing import Any, Literal, cast

from torch import Tensor, nn

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.module_names import outermost, pattern_of
from snell_scale.models.timm import structure as timm_structure

# open_clip's names for the unit that is repeated: ResidualAttentionBlock, Bottleneck, …
_BLOCK_CLASS = re.compile(r"(Block|Bottleneck)$")
_IMAGE = "visual."
_TRUNK = "visual.trunk"


def bundle_of(
    module: nn.Module, input_spec: InputSpec, *, towers: Literal["both", "image", "text"] = "both"
) -> ModelBundle:
    """The bundle of a CLIP; the tower that is left out is frozen in place.

    Targets lie in the towers' blocks: nn.MultiheadAttention as a whole (four matrices: q, k, v, out), the linear
    layers and ungrouped convolutions that are called. What leads out of a tower is a bare parameter, or a layer
    outside of the blocks, and is no target. Of image towers from timm, blocks and targets are what
    `timm_structure` says. Groups: "all", "attention", "mlp", "linear", "image", "text"; each within the chosen
    towers.
    """
    _freeze_other_tower(module, towers)
    module.register_forward_hook(_three_outputs)
    inner = _timm_bundle(module, input_spec)
    blocks = outermost(module, _BLOCK_CLASS, outside=(_TRUNK,))
    targets = [*_matched(inner), *_targets(module, blocks)]
    members = _groups(module, [name for name in targets if _is_in(name, towers)])
    parameters = {name for name, _ in module.named_parameters()}
    undecayed = {*cast(Any, module).no_weight_decay(), "logit_scale", "logit_bias"}
    undecayed |= {f"{_TRUNK}.{name}" for name in inner.no_decay} if inner else set()
    return ModelBundle(
        module=module,
        wrap_points=(*(f"{_TRUNK}.{name}" for name in (inner.wrap_points if inner else ())), *blocks),
        target_groups={group: pattern_of(module, names) for group, names in members.items() if names},
        fused_groups=inner.fused_groups if inner else {},
        head_modules=(),
        input_spec=input_spec,
        extra_trainable=("logit_scale",),
        no_decay=frozenset(undecayed & parameters),
        output="image_text_features",
    )


def _freeze_other_tower(module: nn.Module, towers: str) -> None:
    for name, parameter in module.named_parameters():
        if name == "logit_bias" or (name != "logit_scale" and not _is_in(name, towers)):
            parameter.requires_grad_(False)


def _is_in(name: str, towers: str) -> bool:
    return towers == "both" or name.startswith(_IMAGE) == (towers == "image")


def _three_outputs(module: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(image features, text features, 0-d logit scale); SigLIP's models return their logit bias besides."""
    image, text, scale = outputs[:3]
    return image, text, scale.reshape(())


def _timm_bundle(module: nn.Module, input_spec: InputSpec) -> ModelBundle | None:
    trunk = getattr(cast(Any, module).visual, "trunk", None)
    return None if trunk is None else timm_structure.bundle_of(trunk, input_spec)


def _matched(inner: ModelBundle | None) -> list[str]:
    """The targets within a trunk from timm, by their names in the CLIP."""
    if inner is None:
        return []
    names = [name for name, _ in inner.module.named_modules()]
    return [f"{_TRUNK}.{name}" for name in names if re.fullmatch(inner.target_groups["all"], name)]


def _targets(module: nn.Module, blocks: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    attention: tuple[str, ...] = ()
    for block in blocks:
        for name, child in module.get_submodule(block).named_modules(prefix=block):
            is_layer = isinstance(child, nn.Linear) or (isinstance(child, nn.Conv2d) and child.groups == 1)
            is_attention = isinstance(child, nn.MultiheadAttention)
            if is_attention:
                attention = (*attention, f"{name}.")
            if is_attention or (is_layer and not name.startswith(attention)):
                found.append(name)
    return found


def _groups(module: nn.Module, targets: list[str]) -> dict[str, list[str]]:
    belongs: dict[str, Callable[[str], bool]] = {
        "all": lambda name: True,
        "linear": lambda name: isinstance(module.get_submodule(name), nn.Linear),
        "attention": lambda name: "attn" in name.split("."),
        "mlp": lambda name: "mlp" in name.split("."),
        "image": lambda name: _is_in(name, "image"),
        "text": lambda name: _is_in(name, "text"),
    }
    return {group: [name for name in targets if is_member(name)] for group, is_member in belongs.items()}
