"""Arguments of diffusers' classes from a config: names that exist, and what this package calls a model with."""

import difflib
import inspect
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from snell_scale.models.diffusers.shapes import CLASSES, Denoiser

# A UNet with these is told of more than the prompt, and would be called without it.
_TOLD_MORE = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")
_TOLD_SIZES = "text_time"


def import_diffusers() -> ModuleType:
    """The library; ValueError that names the extra where it is not installed."""
    try:
        diffusers = import_module("diffusers")
        import_module("transformers")  # without it diffusers has no pipeline of text to images
    except ImportError as error:
        raise ValueError(
            f"diffusers cannot be imported ({error}): pip install 'snell-scale[diffusion]'"
        ) from None
    return diffusers


def with_defaults(cls: type[Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `cls`, those that are not given at their defaults."""
    return {
        name: arguments.get(name, parameter.default)
        for name, parameter in inspect.signature(cls).parameters.items()
    }


def check_arguments(denoiser: Denoiser, given: Mapping[str, Any]) -> None:
    """ValueError for one of `given` that the model's class does not have, or that asks for more conditions.

    A folder's own config.json may hold settings of other releases, as diffusers allows.
    """
    name = CLASSES[denoiser.architecture]
    check_names("model.arguments", given, getattr(import_diffusers(), name))
    if denoiser.architecture != "unet":
        return
    more = [key for key in _TOLD_MORE if denoiser.arguments.get(key) is not None]
    if denoiser.arguments.get("addition_embed_type") not in (None, _TOLD_SIZES):
        more.append("addition_embed_type")
    if more:
        settings = ", ".join(f"{key}={denoiser.arguments[key]!r}" for key in more)
        raise ValueError(
            f"the {name} has {settings}, but is conditioned on prompts alone (and, as SDXL is, on the image's "
            "size); choose a text-to-image model"
        )
    if not isinstance(denoiser.arguments.get("cross_attention_dim", 0), int):
        raise ValueError("the UNet's cross_attention_dim differs between blocks, expected one width of the text")


def check_scheduler(config: Mapping[str, Any]) -> None:
    """ValueError for a noise schedule that diffusers does not have, or with an unknown setting."""
    diffusers = import_diffusers()
    name = config.get("_class_name", "DDPMScheduler")
    known = [key for key in dir(diffusers) if key.endswith("Scheduler")]
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"model.scheduler._class_name is {name!r}, which diffusers does not have: {hint}".rstrip()
        )
    check_names("model.scheduler", config, getattr(diffusers, name))


def check_names(where: str, given: Mapping[str, Any], cls: type[Any]) -> None:
    """diffusers warns of a setting that it does not know, and goes on without it."""
    known = list(inspect.signature(cls).parameters)
    for name in given:
        if name not in known and not name.startswith("_"):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{where} has {name!r}, unknown to {cls.__name__}: {hint}Valid: {', '.join(known)}")
