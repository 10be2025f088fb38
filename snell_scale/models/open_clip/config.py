"""CLIP models from open_clip: any architecture it lists or one of stated size, adapted in both towers or one."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from snell_scale.config import StrictModel
from snell_scale.interfaces import InputSpec, ModelBundle, Preprocessing
from snell_scale.models.open_clip.preprocessing import Tokenizer, image_spec
from snell_scale.models.open_clip.settings import (
    check_arguments,
    check_images,
    check_tag,
    import_open_clip,
    named_settings,
)
from snell_scale.models.open_clip.structure import bundle_of
from snell_scale.models.open_clip.weights import check_file, hub_file, load_weights

_CUSTOM = "custom"
_HUB = "pretrained:"


class OpenClipConfig(StrictModel):
    """A CLIP of open_clip by name, or "custom" with its sizes in `arguments`. Gives image and text features.

    Adapted are the layers of both towers' blocks; nn.MultiheadAttention as q, k, v and out. SigLIP's models train
    with the softmax loss here: their logit bias, made for the sigmoid loss, stays fixed and unused.
    """

    name: Literal["open_clip"] = "open_clip"
    architecture: str = Field(
        min_length=1, description="A name of open_clip, e.g. ViT-L-14 or ViT-H-14, or 'custom' with `arguments`."
    )
    arguments: dict[str, Any] = Field(
        default={}, description="Of 'custom': open_clip's model config {embed_dim, vision_cfg, text_cfg}."
    )
    weights: str | None = Field(
        default=None,
        description="A .safetensors, .pt or .bin file (OpenAI's archives too), 'pretrained:<tag>' (by open_clip, "
        "from its hub), or null: random.",
    )
    tag: str | None = Field(
        default=None,
        description="For weights from a file: the tag in open_clip's list that they were published under, which "
        "says how images are normalised and which activation it has. null: what open_clip_config.json beside the "
        "file says.",
    )
    towers: Literal["both", "image", "text"] = Field(
        default="both", description="Which are adapted or trained; the other one stays as it is."
    )

    @model_validator(mode="after")
    def _check(self) -> "OpenClipConfig":
        if self.architecture == _CUSTOM:
            check_arguments(self.arguments)
        elif self.arguments:
            raise ValueError("arguments are for architecture=custom alone: remove them, or set that")
        if self.tag is not None and (self.weights is None or self.weights.startswith(_HUB)):
            raise ValueError("tag belongs to weights from a file: remove it, or write weights=pretrained:<tag>")
        return self

    def describe(self) -> str:
        """A short label for records and tables."""
        towers = "" if self.towers == "both" else f", {self.towers} tower"
        if self.architecture != _CUSTOM:
            return f"{self.architecture}{towers}"
        sizes = [f"{self.arguments[key].get('width')}" for key in ("vision_cfg", "text_cfg")]
        return f"CLIP(width={'/'.join(sizes)}){towers}"

    def check(self) -> None:
        """ValueError where the architecture is unknown or the weights are not there; builds nothing."""
        if self.weights is not None and not self.weights.startswith(_HUB):
            check_file(Path(self.weights))
        settings = self._settings()
        for tag in (self._hub_tag, self.tag):
            if tag is not None:
                check_tag(self.architecture, tag, quick_gelu=bool(settings.get("quick_gelu")))

    def preprocessing(self) -> Preprocessing:
        """Size and normalisation of images, and the tokenizer; builds no model.

        ValueError: see `check`; also a tokenizer that is not on this machine, and weights from a file whose
        normalisation could be one or another.
        """
        self.check()
        settings = self._settings()
        weights_file = None if self.weights is None or self._hub_tag else Path(self.weights)
        image = image_spec(self.architecture, settings, tag=self._hub_tag or self.tag, weights_file=weights_file)
        tokenizer = self._tokenizer(settings)
        tokenizer.check()
        return Preprocessing(image=image, tokenize=tokenizer)

    def build(self, *, num_classes: int, input_spec: InputSpec, seed: int) -> ModelBundle:
        """The model on the CPU (or the current default device), its initial weights a function of `seed`.

        num_classes plays no part: classes are told by their names. ValueError: see `check`; also images of
        another size, arguments that open_clip refuses, and weights that do not fit the model.
        """
        self.check()
        settings = self._settings()
        check_images(settings["vision_cfg"], input_spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self._construct(settings)
        if self.weights is not None:
            tag = self._hub_tag
            path = Path(self.weights) if tag is None else hub_file(self.architecture, tag)
            quick_gelu = bool(settings.get("quick_gelu"))
            load_weights(module, path, architecture=self.architecture, quick_gelu=quick_gelu)
        bundle = bundle_of(module, input_spec, towers=self.towers)
        return replace(bundle, tokenize=self._tokenizer(settings))

    @property
    def _hub_tag(self) -> str | None:
        weights = self.weights or ""
        return weights.removeprefix(_HUB) if weights.startswith(_HUB) else None

    def _tokenizer(self, settings: dict[str, Any]) -> Tokenizer:
        return Tokenizer.of(None if self.architecture == _CUSTOM else self.architecture, settings["text_cfg"])

    def _settings(self) -> dict[str, Any]:
        """open_clip's model config: {embed_dim, vision_cfg, text_cfg, …}."""
        return self.arguments if self.architecture == _CUSTOM else named_settings(self.architecture)

    def _construct(self, settings: dict[str, Any]) -> nn.Module:
        open_clip = import_open_clip()
        settings = {**settings, "text_cfg": {**settings["text_cfg"]}}
        is_hf = "hf_model_name" in settings["text_cfg"]
        if is_hf:
            settings["text_cfg"]["hf_model_pretrained"] = False
        custom_text = settings.pop("custom_text", False) or is_hf
        # FSDP2 and ZeRO-3 take no parameter without a dimension. torch and open_clip load either into either.
        settings["nonscalar_logit_scale"] = True
        try:
            return (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**settings)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ValueError(
                f"open_clip refuses to build {self.describe()}: {error}; change model.arguments"
            ) from error
        except OSError as error:
            raise ValueError(
                f"the config of {self.architecture}'s text tower, {settings['text_cfg']['hf_model_name']}, could "
                f"not be fetched: {error}; connect to the internet, or choose another architecture"
            ) from error
