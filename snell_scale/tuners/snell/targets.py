"""Which modules of a model an adapter goes on: 'all-linear', and names that match nothing."""

import warnings
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from snell_scale.tuners.snell.config import SnellConfig
from snell_scale.tuners.snell.plan import matches


def resolve_all_linear(config: SnellConfig, model: nn.Module) -> None:
    """Replace target_modules='all-linear' by the names of the model's linear layers.

    Left out are what peft leaves out (output embeddings, heads of sequence classifiers, exclude_modules,
    modules_to_save), timm's classifier (`get_classifier`), and layers whose weight the parent reads directly.
    """
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    _maybe_include_all_linear_layers(config, model)
    assert config.target_modules is not None
    whole = [*_classifiers(model), *(m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper))]
    excluded = {name for name, module in model.named_modules() if any(module is other for other in whole)}
    linear = [
        name
        for name in sorted(config.target_modules)
        if isinstance(_base_of(model.get_submodule(name)), nn.Linear)
        and check_target_module_exists(config, name)
        and not any(name == other or name.startswith(f"{other}.") for other in excluded)
    ]
    bypassed = [name for name in linear if is_bypassed(model, name)]
    if bypassed:
        warnings.warn(
            f"target_modules='all-linear' leaves out {', '.join(bypassed)}: their parents read the weight "
            "without calling the layer, so adapters on them would have no effect; name an nn.MultiheadAttention "
            "itself to adapt it",
            stacklevel=2,
        )
    config.target_modules = [name for name in linear if name not in bypassed]
    if not config.target_modules:
        raise ValueError("target_modules='all-linear' found no nn.Linear beside the classifier in this model")


def check_targets(config: SnellConfig, model: nn.Module) -> None:
    """ValueError where target_modules, or one of the names in it, matches no module of the model."""
    targets = config.target_modules
    assert targets is not None
    names = [name for name, _ in outer_modules(model)]
    patterns = [targets] if isinstance(targets, str) else [[target] for target in sorted(targets)]
    missing = [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
    if missing:
        asked = ", ".join(repr(entry if isinstance(entry, str) else entry[0]) for entry in missing)
        raise ValueError(f"target_modules: {asked} matches no module of this model. {_candidates(model)}")


def is_bypassed(model: nn.Module, name: str) -> bool:
    """Whether the module's parent reads its weight instead of calling it, so that an adapter would do nothing."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention):
        return child == "out_proj"
    if child == "qkv" and getattr(parent, "qkv_bias_separate", True) is False and parent.q_bias is not None:
        return True  # timm's EVA, BEiT and Swin-V2, unless they were told to call the layer
    fast_path = isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled()
    return fast_path and child in ("self_attn", "linear1", "linear2")


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules without the root and without what lies inside adapter layers."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or "\0"):
            continue
        yield name, module
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")


def _classifiers(model: nn.Module) -> list[nn.Module]:
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return []
    found = get_classifier()
    return [m for m in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(m, nn.Module)]


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _candidates(model: nn.Module) -> str:
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    layers = [name for kind in kinds for name, m in outer_modules(model) if isinstance(_base_of(m), kind)]
    if not layers:
        return "It has no nn.Linear, nn.Conv2d or nn.MultiheadAttention to adapt."
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))[:8]
    return f"Try name endings such as {', '.join(map(repr, endings))} (as in {layers[0]}), or 'all-linear'."
