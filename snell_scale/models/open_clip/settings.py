"""open_clip's model configs, by name or stated by the user, and what is wrong with them before any building."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from snell_scale.interfaces import InputSpec

_REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")
_OPTIONAL = ("quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias")


def import_open_clip() -> Any:
    """The package; ValueError with the way to install it."""
    try:
        import open_clip  # seconds of import that a config with a typo elsewhere should not wait for
    except ModuleNotFoundError as error:
        raise ValueError(f"model.name=open_clip needs {error.name}: pip install snell-scale[clip]") from error
    return open_clip


def named_settings(architecture: str) -> dict[str, Any]:
    """open_clip's config of that name, {embed_dim, vision_cfg, text_cfg, …}; ValueError with the nearest one."""
    open_clip = import_open_clip()
    if architecture not in open_clip.list_models():
        known = {name.lower(): name for name in ["custom", *open_clip.list_models()]}
        close = difflib.get_close_matches(architecture.lower(), known, n=3)
        hint = f"did you mean {' or '.join(known[name] for name in close)}? " if close else ""
        raise ValueError(
            f"model.architecture is {architecture!r}, which open_clip {open_clip.__version__} does not know: "
            f"{hint}open_clip.list_models() lists the names"
        )
    settings = open_clip.get_model_config(architecture)
    if "multimodal_cfg" in settings:
        raise ValueError(
            f"model.architecture is {architecture!r}, a CoCa, which writes captions besides: only models of two "
            "towers are supported, e.g. ViT-L-14"
        )
    return settings


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """ValueError where a config that the user states lacks an entry or has one that open_clip does not know."""
    missing = [key for key in _REQUIRED if key not in arguments]
    if missing:
        raise ValueError(
            f"arguments lacks {', '.join(missing)}: architecture=custom needs {', '.join(_REQUIRED)}, as in "
            "open_clip's model configs"
        )
    _check_names("arguments", arguments, [*_REQUIRED, *_OPTIONAL])
    open_clip = import_open_clip()
    for key, known in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
        if not isinstance(arguments[key], Mapping):
            raise ValueError(f"arguments.{key} is {arguments[key]!r}, expected a mapping such as {{width: 64}}")
        _check_names(f"arguments.{key}", arguments[key], [field.name for field in fields(known)])


def check_tag(architecture: str, tag: str, *, quick_gelu: bool) -> None:
    """ValueError where open_clip has no such weights of the architecture, or with another activation."""
    open_clip = import_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    found = open_clip.get_pretrained_cfg(architecture, tag)
    if not found:
        close = difflib.get_close_matches(tag, tags, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"open_clip has no weights of {architecture} tagged {tag!r}: {hint}It has: "
            f"{', '.join(tags) or 'none'}"
        )
    check_activation(architecture, tag, wanted=bool(found.get("quick_gelu")), quick_gelu=quick_gelu)


def check_activation(architecture: str, weights: str, *, wanted: bool, quick_gelu: bool) -> None:
    """ValueError where the weights were trained with QuickGELU and the model has GELU, or the other way round."""
    base = architecture.removesuffix("-quickgelu")
    other = f"{base}-quickgelu" if wanted else base
    is_named = other in import_open_clip().list_models()
    # open_clip's list leaves it out of the weights whose architecture has it under its one name (RoBERTa's).
    if wanted == quick_gelu or (is_named and other == architecture):
        return
    remedy = f"model.architecture={other}" if is_named else f"quick_gelu={str(wanted).lower()} in model.arguments"
    raise ValueError(
        f"model.weights: {weights} was trained with {'QuickGELU' if wanted else 'GELU'}, and {architecture} has "
        f"{'QuickGELU' if quick_gelu else 'GELU'}: set {remedy}"
    )


def image_size(vision_cfg: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the images that the tower takes, pixels."""
    size = vision_cfg.get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def check_images(vision_cfg: Mapping[str, Any], input_spec: InputSpec) -> None:
    """ValueError where the data's images are not what the image tower takes."""
    if input_spec.channels != 3:
        raise ValueError(
            f"the images have {input_spec.channels} channel(s), and CLIP's image towers take 3: set "
            "data.channels=3"
        )
    size, wanted = (input_spec.height, input_spec.width), image_size(vision_cfg)
    if size != wanted:
        raise ValueError(
            f"the images have {size[0]}x{size[1]} pixels, and the image tower takes {wanted[0]}x{wanted[1]}: set "
            "data.image_size, or model.arguments.vision_cfg.image_size of a custom model"
        )
    patch = vision_cfg.get("patch_size", 16)
    is_plain = "timm_model_name" not in vision_cfg and isinstance(vision_cfg.get("layers", 12), int)
    if is_plain and isinstance(patch, int) and (size[0] % patch or size[1] % patch):
        raise ValueError(
            f"patches of {patch} pixels do not fill images of {size[0]}x{size[1]}: the rest would be dropped; "
            "change model.arguments.vision_cfg.patch_size or image_size"
        )


def _check_names(where: str, given: Mapping[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{where} has {name!r}: {hint}Valid: {', '.join(known)}")
