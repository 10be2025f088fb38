"""Models from timm: any registered architecture, or a VisionTransformer of stated size; local or hub weights."""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from snell_scale.config import StrictModel
from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.timm_structure import bundle_of

_EXPLICIT = "vision_transformer"
_HUB = "pretrained"
_OWN_ARGUMENTS = ("num_classes", "in_chans", "img_size")


class TimmConfig(StrictModel):
    """A timm model by name, or "vision_transformer" with its sizes in `arguments`."""

    name: Literal["timm"] = "timm"
    architecture: str = Field(
        min_length=1, description="Any timm name, or 'vision_transformer' with `arguments` (embed_dim, depth, …)."
    )
    arguments: dict[str, Any] = Field(default={}, description="Further arguments of the timm model.")
    weights: str | None = Field(
        default=None, description="A .safetensors file, 'pretrained' (timm's own, from its hub), or null: random."
    )
    head: Literal["keep", "new"] = Field(
        default="new", description="Whether the classifier in `weights` is loaded."
    )

    @model_validator(mode="after")
    def _check(self) -> "TimmConfig":
        own = [key for key in _OWN_ARGUMENTS if key in self.arguments]
        if own:
            raise ValueError(f"arguments has {own}, which follow from the data: remove them")
        return self

    def describe(self) -> str:
        """A short label for records and tables."""
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.architecture}({arguments})" if arguments else self.architecture

    def check(self) -> None:
        """ValueError where the architecture is unknown or the weights are not there; builds nothing."""
        if self.weights not in (None, _HUB):
            _check_file(Path(str(self.weights)))
        import timm  # seconds of import that a config with a typo elsewhere should not wait for

        if self.architecture != _EXPLICIT and not timm.is_model(self.architecture):
            close = difflib.get_close_matches(self.architecture, [_EXPLICIT, *timm.list_models()], n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(
                f"model.architecture is {self.architecture!r}, which timm {timm.__version__} does not know: "
                f"{hint}timm.list_models() lists the names"
            )
        _check_tag(self.architecture)
        if self.weights == _HUB and not timm.is_model_pretrained(self.architecture):
            raise ValueError(
                f"model.weights is 'pretrained', but timm has no weights for {self.architecture!r}; "
                "give a .safetensors file, or null for random weights"
            )

    def build(self, *, num_classes: int, input_spec: InputSpec, seed: int) -> ModelBundle:
        """The model on the CPU (or the current default device), its initial weights a function of `seed`.

        ValueError: see `check`; also arguments that timm refuses, and weights that do not fit the model.
        """
        self.check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self._construct(num_classes, input_spec)
        if self.weights == _HUB:
            pretrained = cast(Mapping[str, Any], module.pretrained_cfg)
            input_spec = replace(input_spec, mean=tuple(pretrained["mean"]), std=tuple(pretrained["std"]))
        _check_patches(module, input_spec)
        bundle = bundle_of(module, input_spec)
        if self.weights not in (None, _HUB):
            _load_weights(bundle, Path(str(self.weights)), keep_head=self.head == "keep")
        return bundle

    def _construct(self, num_classes: int, input_spec: InputSpec) -> nn.Module:
        import timm
        from timm.models import VisionTransformer

        arguments = {**self.arguments, "num_classes": num_classes, "in_chans": input_spec.channels}
        size = (input_spec.height, input_spec.width)
        try:
            if self.architecture == _EXPLICIT:
                _check_names(self.arguments, VisionTransformer)
                return VisionTransformer(**arguments, img_size=size)
            defaults = timm.models.get_pretrained_cfg(self.architecture)
            # Convolutional models take any size and refuse the argument.
            if defaults is not None and defaults.fixed_input_size:
                arguments["img_size"] = size
            if self.weights != _HUB:
                return timm.create_model(self.architecture, **arguments)
            self._check_hub_head(num_classes)
            return timm.create_model(self.architecture, pretrained=True, **arguments)
        except (TypeError, AssertionError) as error:
            raise ValueError(
                f"timm refuses to build {self.describe()} for {num_classes} classes and "
                f"{size[0]}x{size[1]} images: {error}; change model.arguments or data.image_size"
            ) from error
        except OSError as error:
            raise ValueError(
                f"the weights of {self.architecture} could not be fetched: {error}; connect to the internet, or "
                "give model.weights a local .safetensors file"
            ) from error

    def _check_hub_head(self, num_classes: int) -> None:
        from timm.models import get_pretrained_cfg_value

        found = get_pretrained_cfg_value(self.architecture, "num_classes")
        if self.head == "keep" and found != num_classes:
            raise ValueError(
                f"model.head is 'keep', but the head of {self.architecture} has {found} classes and the data "
                f"{num_classes}; set model.head=new"
            )


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"model.weights: there is no file {path} (looked for from {Path.cwd()}); make it first (the demo's: "
            "snell-scale run configs/demo/pretrain.yaml), or give the .safetensors file of another run, "
            "'pretrained', or null for random weights"
        )
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(f"model.weights: {path} is not a complete safetensors file: {error}") from error


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


def _check_names(arguments: Mapping[str, Any], cls: type[nn.Module]) -> None:
    """timm's own message for a wrong argument does not say which ones there are."""
    known = [name for name in inspect.signature(cls).parameters if name not in _OWN_ARGUMENTS]
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"model.arguments has {name!r}: {hint}Valid: {', '.join(known)}")


def _check_patches(module: nn.Module, input_spec: InputSpec) -> None:
    """Pixels that fill no whole patch would be dropped without a word."""
    height, width = getattr(getattr(module, "patch_embed", None), "patch_size", None) or (1, 1)
    if input_spec.height % height or input_spec.width % width:
        raise ValueError(
            f"the model's {height}x{width} patches do not divide the data's "
            f"{input_spec.height}x{input_spec.width} images; change model.arguments.patch_size or data.image_size"
        )


def _load_weights(bundle: ModelBundle, path: Path, *, keep_head: bool) -> None:
    """Copy a whole state dict in; without its head unless asked for. ValueError lists what does not fit."""
    heads = tuple(f"{name}." for name in bundle.head_modules)
    own = bundle.module.state_dict()
    saved = load_file(path)
    if not keep_head:
        own = {name: tensor for name, tensor in own.items() if not name.startswith(heads)}
        saved = {name: tensor for name, tensor in saved.items() if not name.startswith(heads)}
    problems = _mismatches(own, saved)
    if problems:
        advice = "; if the classes differ, set model.head=new" if keep_head else ""
        raise ValueError(f"model.weights: {path} does not fit the model: {'; '.join(problems)}{advice}")
    bundle.module.load_state_dict(saved, strict=False)


def _mismatches(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    shapes = [
        f"{name} is {tuple(saved[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in saved and own[name].shape != saved[name].shape
    ]
    listed = {"missing": sorted(own.keys() - saved.keys()), "unexpected": sorted(saved.keys() - own.keys())}
    names = [f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in listed.items() if keys]
    return names + ([f"{len(shapes)} of another shape: {_first(shapes)}"] if shapes else [])


def _first(items: list[str]) -> str:
    shown = ", ".join(items[:5])
    return f"{shown}, …" if len(items) > 5 else shown
