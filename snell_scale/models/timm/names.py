"""Names of timm models: what exists, from which source, and what the weights behind a name expect."""

import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from snell_scale.interfaces import InputSpec

EXPLICIT = "vision_transformer"
OWN_ARGUMENTS = ("num_classes", "in_chans", "img_size")
_HUB_SOURCES = ("hf-hub:", "hf_hub:")
_FOLDER_SOURCE = "local-dir:"


def check_architecture(architecture: str) -> None:
    """ValueError where timm knows no such name or tag, or the folder of a "local-dir:" holds no timm model."""
    if architecture == EXPLICIT or architecture.startswith(_HUB_SOURCES):
        return  # what lies on the hub is seen when it is fetched
    import timm  # seconds of import that a config with a typo elsewhere should not wait for

    if architecture.startswith(_FOLDER_SOURCE):
        published_config(architecture)
        return
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, [EXPLICIT, *timm.list_models()], n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"model.architecture is {architecture!r}, which timm {timm.__version__} does not know: "
            f"{hint}timm.list_models() lists the names"
        )
    _check_tag(architecture)


def has_pretrained(architecture: str) -> bool:
    """Whether timm has weights of its own for this name."""
    import timm

    return is_sourced(architecture) or (architecture != EXPLICIT and timm.is_model_pretrained(architecture))


def is_sourced(architecture: str) -> bool:
    """Whether the name says where the model comes from: the hub, or a folder in the hub's layout."""
    return architecture.startswith((*_HUB_SOURCES, _FOLDER_SOURCE))


def published_config(architecture: str) -> Mapping[str, Any]:
    """timm's entry for the weights of this name: input_size, mean, std, interpolation, crop_pct, num_classes, …

    Of a name without a tag, that of timm's default weights. For a hub name its config.json is fetched.
    ValueError where it cannot be.
    """
    from timm.models import PretrainedCfg, get_pretrained_cfg, parse_model_name
    from timm.models import load_model_config_from_hf as from_hub
    from timm.models._hub import load_model_config_from_path as from_folder

    if not is_sourced(architecture):
        found = get_pretrained_cfg(architecture) or PretrainedCfg()
        return found.to_dict()
    _, where = parse_model_name(architecture)
    read = from_folder if architecture.startswith(_FOLDER_SOURCE) else from_hub
    try:
        config, _, _ = read(where)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        hint = (
            f"expected the config.json and weights of a timm model in {Path(where).absolute()}"
            if architecture.startswith(_FOLDER_SOURCE)
            else "connect to the internet, or fetch the folder and give local-dir:PATH"
        )
        raise ValueError(f"model.architecture: {architecture} could not be read: {error}; {hint}") from error
    return {**PretrainedCfg().to_dict(), **config}


def published_input(architecture: str) -> InputSpec:
    """What the weights of this name expect of an image."""
    config = published_config(architecture)
    channels, height, width = config["input_size"]
    return InputSpec(
        channels,
        height,
        width,
        tuple(config["mean"]),
        tuple(config["std"]),
        interpolation=config["interpolation"] or "bicubic",
        crop_fraction=config["crop_pct"] or 1.0,
    )


def statistics_differ(architecture: str) -> bool:
    """Whether the name has no tag and timm's weights under it expect different means: a file may be any."""
    from timm.models import get_arch_name, get_pretrained_cfg, list_pretrained

    if architecture == EXPLICIT or is_sourced(architecture) or "." in architecture:
        return False
    entries = [get_pretrained_cfg(name) for name in list_pretrained(f"{get_arch_name(architecture)}.*")]
    return len({tuple(entry.mean) for entry in entries if entry is not None}) > 1


def check_arguments(arguments: Mapping[str, Any], cls: type[nn.Module]) -> None:
    """timm's own message for a wrong argument does not say which ones there are."""
    known = [name for name in inspect.signature(cls).parameters if name not in OWN_ARGUMENTS]
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"model.arguments has {name!r}: {hint}Valid: {', '.join(known)}")


def _check_tag(architecture: str) -> None:
    """A name may end in the tag of its weights: vit_base_patch16_224.augreg_in21k."""
    from timm.models import get_arch_name, list_pretrained

    base, _, tag = architecture.partition(".")
    tagged = list_pretrained(f"{get_arch_name(base)}.*")
    if tag and architecture not in tagged:
        raise ValueError(
            f"model.architecture is {architecture!r}, but {base} has no weights tagged {tag!r}; it has: "
            f"{', '.join(tagged) or 'none'}"
        )
