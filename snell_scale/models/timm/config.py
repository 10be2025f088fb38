"""Models from timm: any registered architecture, or a VisionTransformer of stated size; local or hub weights."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from snell_scale.config import StrictModel
from snell_scale.interfaces import InputSpec, ModelBundle, Preprocessing
from snell_scale.models.timm import names as timm_names
from snell_scale.models.timm.names import EXPLICIT, OWN_ARGUMENTS
from snell_scale.models.timm.structure import bundle_of, patch_size
from snell_scale.models.timm.weights import load_timm_weights, recipe_of
from snell_scale.models.weight_files.reading import check_weights

_HUB = "pretrained"
_REMEDY = (
    "make it first (the demo's: snell-scale run configs/demo/pretrain.yaml), or give another file, "
    "'pretrained', or null for random weights"
)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# (mean, std) that files of a recipe were trained with; timm's entry of the architecture may say otherwise.
_STATISTICS = {
    "jax": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "mae": _IMAGENET,
    "mocov3": _IMAGENET,
    "dino": _IMAGENET,
    "deit": _IMAGENET,
}


class TimmConfig(StrictModel):
    """A timm model by name, or "vision_transformer" with its sizes in `arguments`."""

    name: Literal["timm"] = "timm"
    architecture: str = Field(
        min_length=1,
        description="Any timm name, with or without the tag of its weights (vit_large_patch16_224.mae), "
        "hf-hub:OWNER/NAME, local-dir:FOLDER, or 'vision_transformer' with `arguments` (embed_dim, depth, …).",
    )
    arguments: dict[str, Any] = Field(default={}, description="Further arguments of the timm model.")
    weights: str | None = Field(
        default=None,
        description="A .npz, .pth, .pth.tar, .pt, .bin or .safetensors file in any published layout, "
        "'pretrained' (the ones behind the name, from its hub or folder), or null: random.",
    )
    head: Literal["keep", "new"] = Field(
        default="new", description="Whether the classifier in `weights` is loaded."
    )
    mean: tuple[float, ...] | None = Field(
        default=None,
        strict=False,
        description="What the weights expect, per channel; null: as timm's entry or the file tells.",
    )
    std: tuple[float, ...] | None = Field(default=None, strict=False, description="As mean.")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        default=None, description="How images are resized; null: as timm's entry of the name says."
    )

    @model_validator(mode="after")
    def _check(self) -> "TimmConfig":
        own = [key for key in OWN_ARGUMENTS if key in self.arguments]
        if own:
            raise ValueError(f"arguments has {own}, which follow from the data: remove them")
        given = [key for key in ("mean", "std", "interpolation") if getattr(self, key) is not None]
        if given and self.architecture == EXPLICIT:
            raise ValueError(f"{given[0]} does nothing for {EXPLICIT}, whose input the data decide: remove it")
        if self.mean and self.std and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} numbers and std {len(self.std)}: give one per channel")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}, expected numbers above 0")
        return self

    def describe(self) -> str:
        """A short label for records and tables."""
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.architecture}({arguments})" if arguments else self.architecture

    def check(self) -> None:
        """ValueError where the architecture is unknown, or the weights are absent or damaged; builds nothing."""
        if self._file is not None:
            check_weights(self._file, remedy=_REMEDY)
        timm_names.check_architecture(self.architecture)
        if self.weights == _HUB and not timm_names.has_pretrained(self.architecture):
            raise ValueError(
                f"model.weights is 'pretrained', but timm has no weights for {self.architecture!r}; "
                "give a local file, or null for random weights"
            )

    def preprocessing(self) -> Preprocessing:
        """What the weights expect of an image; image is None for "vision_transformer", where the data decide.

        Size, interpolation and centre crop are those of timm's entry of the name. So are mean and std, unless the
        file's layout tells of another recipe: Google's .npz files expect 0.5 and 0.5; MAE's, MoCo v3's and DINO's
        checkpoints, and a bare ViT under "model" (DeiT, MAE's encoder), ImageNet's. The keys mean, std and
        interpolation go before both.
        """
        if self.architecture == EXPLICIT:
            return Preprocessing()
        self.check()
        spec = timm_names.published_input(self.architecture)
        statistics = _STATISTICS.get(recipe_of(self._file) or "") if self._file else None
        if statistics is not None and spec.channels == len(statistics[0]):
            spec = replace(spec, mean=statistics[0], std=statistics[1])
        elif self._file and self.mean is None and timm_names.statistics_differ(self.architecture):
            _say(
                f"{self._file} does not tell which mean it expects, and timm's weights of {self.architecture} "
                f"differ in it: {list(spec.mean)} is taken; add the weights' tag to model.architecture, or set "
                "model.mean and model.std"
            )
        return Preprocessing(image=self._overridden(spec))

    def build(self, *, num_classes: int, input_spec: InputSpec, seed: int) -> ModelBundle:
        """The model on the CPU (or the current default device), its initial weights a function of `seed`.

        ValueError: see `check`; also arguments that timm refuses, and weights that do not fit the model.
        """
        self.check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self._construct(num_classes, input_spec)
        _check_patches(module, input_spec)
        bundle = bundle_of(module, input_spec)
        if self._file is not None:
            load_timm_weights(bundle, self._file, keep_head=self.head == "keep")
        return bundle

    @property
    def _file(self) -> Path | None:
        return None if self.weights in (None, _HUB) else Path(str(self.weights))

    def _overridden(self, spec: InputSpec) -> InputSpec:
        mean, std = self.mean or spec.mean, self.std or spec.std
        for key, values in (("mean", mean), ("std", std)):
            if len(values) != spec.channels:
                raise ValueError(
                    f"model.{key} has {len(values)} numbers, the weights take {spec.channels} channels"
                )
        return replace(spec, mean=mean, std=std, interpolation=self.interpolation or spec.interpolation)

    def _construct(self, num_classes: int, input_spec: InputSpec) -> nn.Module:
        import timm
        from timm.models import VisionTransformer

        arguments = {**self.arguments, "num_classes": num_classes, "in_chans": input_spec.channels}
        size = (input_spec.height, input_spec.width)
        try:
            if self.architecture == EXPLICIT:
                timm_names.check_arguments(self.arguments, VisionTransformer)
                return VisionTransformer(**arguments, img_size=size)
            published = timm_names.published_config(self.architecture)
            # Convolutional models take any size and refuse the argument.
            if published["fixed_input_size"]:
                arguments["img_size"] = size
            if self.weights != _HUB:
                return timm.create_model(self.architecture, **arguments)
            self._check_hub_head(num_classes, found=published["num_classes"])
            return timm.create_model(self.architecture, pretrained=True, **arguments)
        except (TypeError, AssertionError) as error:
            raise ValueError(
                f"timm refuses to build {self.describe()} for {num_classes} classes and "
                f"{size[0]}x{size[1]} images: {error}; change model.arguments or data.image_size"
            ) from error
        except (OSError, RuntimeError) as error:
            if self.weights != _HUB and not timm_names.is_sourced(self.architecture):
                raise
            raise ValueError(
                f"{self.architecture} could not be fetched or does not fit: {error}; connect to the internet, or "
                "give model.weights a local file"
            ) from error

    def _check_hub_head(self, num_classes: int, *, found: int) -> None:
        if self.head == "keep" and found != num_classes:
            raise ValueError(
                f"model.head is 'keep', but the head of {self.architecture} has {found} classes and the data "
                f"{num_classes}; set model.head=new"
            )


def _check_patches(module: nn.Module, input_spec: InputSpec) -> None:
    """Pixels that fill no whole patch would be dropped without a word."""
    height, width = patch_size(module)
    if input_spec.height % height or input_spec.width % width:
        raise ValueError(
            f"the model's {height}x{width} patches do not divide the data's "
            f"{input_spec.height}x{input_spec.width} images; change model.arguments.patch_size or data.image_size"
        )


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"model.weights: {text}", file=sys.stderr)
