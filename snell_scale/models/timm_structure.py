"""What a tuner and an engine must know of a timm model, read off the model: blocks, targets, head."""

import re
from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from snell_scale.interfaces import InputSpec, ModelBundle

# timm's names for the unit that is repeated: Block, SwinTransformerBlock, BasicBlock, Bottleneck, …
_BLOCK_CLASS = re.compile(r"(Block|Bottleneck|InvertedResidual|DepthwiseSeparableConv)$")


def bundle_of(module: nn.Module, input_spec: InputSpec) -> ModelBundle:
    """The bundle of a timm model.

    Targets are the linear layers and ungrouped convolutions other than the stem (patch embedding) and the
    head. Groups: "all", "linear", "attention" (below a module named attn), "mlp" (below one named mlp).
    """
    heads = _head_modules(module)
    targets = _targets(module, heads)
    names = {
        "all": targets,
        "linear": [name for name in targets if isinstance(module.get_submodule(name), nn.Linear)],
        "attention": [name for name in targets if "attn" in name.split(".")],
        "mlp": [name for name in targets if "mlp" in name.split(".")],
    }
    parameters = dict(module.named_parameters())
    return ModelBundle(
        module=module,
        wrap_points=_blocks(module),
        target_groups={group: _pattern(module, members) for group, members in names.items() if members},
        fused_groups=_fused_groups(module, targets),
        head_modules=heads,
        input_spec=input_spec,
        extra_trainable=tuple(name for name in ("cls_token",) if name in parameters),
        no_decay=frozenset(_undecayed(module) & parameters.keys()),
    )


def _head_modules(module: nn.Module) -> tuple[str, ...]:
    classifier = cast(Any, module).get_classifier()  # of every timm model, but of no type it declares
    classifiers = classifier if isinstance(classifier, tuple) else (classifier,)
    return tuple(
        name for name, child in module.named_modules() if name and any(child is one for one in classifiers)
    )


def _targets(module: nn.Module, heads: tuple[str, ...]) -> list[str]:
    names = [
        name
        for name, child in module.named_modules()
        if (isinstance(child, nn.Linear) or (isinstance(child, nn.Conv2d) and child.groups == 1))
        and name not in heads
    ]
    stem = next((name for name in names if isinstance(module.get_submodule(name), nn.Conv2d)), "")
    root = stem.split(".")[0]
    outside = [name for name in names if name.split(".")[0] != root]
    # Where stem and body live in one container (VGG's features), only the first convolution is the stem.
    return outside or [name for name in names if name != stem]


def _blocks(module: nn.Module) -> tuple[str, ...]:
    """The outermost repeated blocks, in order."""
    found: list[str] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if _BLOCK_CLASS.search(type(child).__name__) and not inside:
            found.append(name)
    return tuple(found)


def _fused_groups(module: nn.Module, targets: Iterable[str]) -> dict[str, int]:
    named_qkv = [module.get_submodule(name) for name in targets if name.split(".")[-1] == "qkv"]
    linear = [layer for layer in named_qkv if isinstance(layer, nn.Linear)]
    return {"qkv": 3} if any(layer.out_features == 3 * layer.in_features for layer in linear) else {}


def _pattern(module: nn.Module, names: list[str]) -> str:
    """A regular expression of exactly these full names; layer numbers become \\d+ where that adds no module."""
    wanted, everything = set(names), [name for name, _ in module.named_modules()]
    patterns: dict[str, None] = {}
    for name in names:
        parts = [r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")]
        short = r"\.".join(parts)
        exact = all(other in wanted for other in everything if re.fullmatch(short, other))
        patterns[short if exact else re.escape(name)] = None
    return "|".join(patterns)


def _undecayed(module: nn.Module) -> set[str]:
    return set(cast(Any, module).no_weight_decay()) if hasattr(module, "no_weight_decay") else set()
