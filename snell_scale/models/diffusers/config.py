"""Denoising models from diffusers: UNets and the transformers of SD3, FLUX and PixArt, with their encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import nn

from snell_scale.config import StrictModel
from snell_scale.interfaces import Diffusion, Encoders, InputSpec, ModelBundle, Preprocessing
from snell_scale.models.diffusers.arguments import (
    check_arguments,
    check_scheduler,
    import_diffusers,
    with_defaults,
)
from snell_scale.models.diffusers.calls import (
    denoise_function,
    latent_channels,
    patch_size,
    pooled_width,
    text_width,
)
from snell_scale.models.diffusers.folder import fetch_weights, load_denoiser, read_folder
from snell_scale.models.diffusers.pipeline_encoders import PipelineEncoders
from snell_scale.models.diffusers.shapes import CLASSES, SHAPES, Architecture, Denoiser, Shape
from snell_scale.models.diffusers.structure import target_groups, wrap_points
from snell_scale.models.diffusers.word_encoders import AbsentEncoders, ConditionShape, WordEncoders
from snell_scale.models.weight_files.fit import mismatches
from snell_scale.models.weight_files.reading import check_weights, read_weights

_WORDS = 8
# Tokens of a prompt in diffusers' pipelines; SD 3 reads CLIP's and the T5's one after the other.
_CLIP_TOKENS = 77
_T5_TOKENS: Mapping[Architecture, int] = {"sd3": 256, "flux": 512, "pixart": 120}
_SIZES = ("sample_size", "block_out_channels", "num_layers", "num_attention_heads", "attention_head_dim")


class DiffusersConfig(StrictModel):
    """A denoiser: of a pipeline folder, of an architecture with stated arguments, or of a published shape."""

    name: Literal["diffusers"] = "diffusers"
    folder: str | None = Field(
        default=None, description="A diffusers pipeline folder (with model_index.json), or its hub id."
    )
    architecture: Architecture | None = Field(default=None, description="Or a class of model, with `arguments`.")
    shape: Shape | None = Field(default=None, description="Or a published model's sizes, without its weights.")
    arguments: dict[str, Any] = Field(
        default={}, description="The diffusers model's own; beside `shape`, those that differ from it."
    )
    scheduler: dict[str, Any] | None = Field(
        default=None,
        description="diffusers' scheduler config (_class_name, num_train_timesteps, beta_schedule, "
        "prediction_type, …); null: the folder's or the shape's own.",
    )
    weights: str | None = Field(
        default=None,
        description="A .safetensors or .bin file of the denoiser; null: the folder's, or random.",
    )
    encoders: Literal["pipeline", "words", "none"] | None = Field(
        default=None,
        description="'pipeline': VAE and text encoders of the folder; 'words': the model works on pixels and "
        "reads fixed random word vectors; null: pipeline with a folder, words with an architecture, none with a "
        "shape.",
    )
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Of the pipeline's encoders."
    )
    text_length: int | None = Field(
        default=None,
        gt=0,
        description=f"Words (null: {_WORDS}), or tokens of the T5 (null: the pipeline's own); CLIP has its 77.",
    )
    words_seed: int = Field(default=0, ge=0, description="Decides the word vectors; not the run's seed.")
    guidance: float = Field(default=1.0, gt=0, description="Told to models distilled for it (FLUX.1-dev).")

    @model_validator(mode="after")
    def _check(self) -> "DiffusersConfig":
        given = [key for key in ("folder", "architecture", "shape") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of folder, architecture and shape, not {given or 'none'}")
        if self.folder is not None and self.arguments:
            raise ValueError("arguments go with architecture or shape; a folder's config.json has its own")
        if self.architecture is not None and self.scheduler is None:
            raise ValueError("architecture comes without a noise schedule: give scheduler")
        if (self.encoders == "pipeline") and self.folder is None:
            raise ValueError("encoders=pipeline are those of a folder: give folder, or encoders=words or none")
        return self

    def describe(self) -> str:
        """A short label for records and tables, with what sizes a model stated by its arguments."""
        if self.folder is not None:
            return Path(self.folder).name
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments.items() if key in _SIZES)
        name = str(self.architecture or self.shape)
        return f"{name}({arguments})" if arguments else name

    def check(self) -> None:
        """ValueError where files, classes or arguments are wrong; builds nothing."""
        import_diffusers()
        denoiser = self._denoiser()
        check_arguments(denoiser, self.arguments)
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.weights is not None:
            check_weights(Path(self.weights), remedy="give the denoiser's .safetensors or .bin file, or null")

    def preprocessing(self) -> Preprocessing:
        """Images in [-1, 1], of the size that the model was made for (FLUX: 1024 pixels).

        A denoiser of pixels that states no sample_size takes any: the data decide.
        """
        denoiser = self._denoiser()
        if denoiser.vae_factor == 1 and not denoiser.arguments.get("sample_size"):
            return Preprocessing()
        side = denoiser.arguments.get("sample_size") or 1024 // denoiser.vae_factor
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        channels = self._image_channels(denoiser)
        half = (0.5,) * channels
        return Preprocessing(
            image=InputSpec(channels, height * denoiser.vae_factor, width * denoiser.vae_factor, half, half)
        )

    def build(self, *, num_classes: int, input_spec: InputSpec, seed: int) -> ModelBundle:
        """The denoiser on the CPU (or the current default device), initial weights without a file from `seed`.

        The latents' size follows input_spec; num_classes does not matter. On the meta device no weight is read.
        ValueError: see `check`; also images of another range or of a size that the model cannot take.
        """
        self.check()
        denoiser = self._denoiser()
        module = self._module(denoiser, seed)
        config = dict(cast(Any, module).config)
        architecture = denoiser.architecture
        return ModelBundle(
            module=module,
            wrap_points=wrap_points(module),
            target_groups=target_groups(module),
            fused_groups={},
            head_modules=(),
            input_spec=input_spec,
            output="denoised",
            diffusion=Diffusion(
                scheduler=dict(denoiser.scheduler),
                encoders=self._make_encoders(denoiser, config),
                latent_shape=self._latent_shape(denoiser, config, input_spec),
                denoise=denoise_function(
                    architecture, config, vae_factor=denoiser.vae_factor, guidance=self.guidance
                ),
                condition_shapes=self._condition_shape(architecture, config).entries(),
            ),
        )

    def _denoiser(self) -> Denoiser:
        if self.folder is not None:
            found = read_folder(self.folder).denoiser
        elif self.shape is not None:
            found = SHAPES[self.shape]
        else:
            assert self.architecture is not None, "checked by the config"
            found = Denoiser(self.architecture, {}, {}, vae_factor=1)
        return Denoiser(
            found.architecture,
            {**found.arguments, **self.arguments},
            found.scheduler if self.scheduler is None else self.scheduler,
            vae_factor=1 if self._encoder_kind == "words" else found.vae_factor,
        )

    @property
    def _encoder_kind(self) -> Literal["pipeline", "words", "none"]:
        if self.encoders is not None:
            return self.encoders
        return "pipeline" if self.folder is not None else "none" if self.shape is not None else "words"

    def _module(self, denoiser: Denoiser, seed: int) -> nn.Module:
        on_meta = torch.empty(0).is_meta
        if self.folder is not None and self.weights is None and not on_meta:
            return load_denoiser(self.folder)
        cls = getattr(import_diffusers(), CLASSES[denoiser.architecture])
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                module = cls.from_config(dict(denoiser.arguments))
        except (TypeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
            raise ValueError(
                f"diffusers refuses to build {cls.__name__} ({self.describe()}): {error}; change model.arguments"
            ) from error
        if self.weights is not None and not on_meta:
            _load_weights(module, Path(self.weights))
        return module

    def _image_channels(self, denoiser: Denoiser) -> int:
        """Of the pixels: the VAE's 3, or what the model itself takes."""
        if self._encoder_kind != "words":
            return 3
        cls = getattr(import_diffusers(), CLASSES[denoiser.architecture])
        return latent_channels(denoiser.architecture, with_defaults(cls, denoiser.arguments))

    def _make_encoders(self, denoiser: Denoiser, config: Mapping[str, Any]) -> Encoders:
        kind = self._encoder_kind
        if kind == "pipeline":
            assert self.folder is not None, "checked by the config"
            dtype = getattr(torch, self.encoder_dtype)
            return PipelineEncoders(fetch_weights(self.folder), dtype=dtype, text_length=self.text_length)
        if kind == "none":
            return AbsentEncoders()
        return WordEncoders(self._condition_shape(denoiser.architecture, config), seed=self.words_seed)

    def _condition_shape(self, architecture: Architecture, config: Mapping[str, Any]) -> ConditionShape:
        return ConditionShape(
            length=self._condition_length(architecture),
            width=text_width(architecture, config),
            pooled=pooled_width(architecture, config),
            masked=architecture == "pixart",
        )

    def _condition_length(self, architecture: Architecture) -> int:
        if self._encoder_kind == "words":
            return self.text_length or _WORDS
        if architecture == "unet":
            return _CLIP_TOKENS
        of_t5 = self.text_length or _T5_TOKENS[architecture]
        return of_t5 + (_CLIP_TOKENS if architecture == "sd3" else 0)

    def _latent_shape(
        self, denoiser: Denoiser, config: Mapping[str, Any], input_spec: InputSpec
    ) -> tuple[int, int, int]:
        channels, half = self._image_channels(denoiser), (0.5,) * input_spec.channels
        if input_spec.channels != channels or (input_spec.mean, input_spec.std) != (half, half):
            raise ValueError(
                f"the data's images have {input_spec.channels} channels, mean {input_spec.mean} and std "
                f"{input_spec.std}; this model takes {channels} channels in [-1, 1] (mean and std 0.5): set "
                f"data.channels={channels} and data.scaling=symmetric, where the data have these keys"
            )
        unit = denoiser.vae_factor * patch_size(denoiser.architecture, config)
        if input_spec.height % unit or input_spec.width % unit:
            raise ValueError(
                f"the data's images are {input_spec.height}x{input_spec.width} pixels, expected multiples of "
                f"{unit}; change data.image_size"
            )
        height, width = input_spec.height // denoiser.vae_factor, input_spec.width // denoiser.vae_factor
        return latent_channels(denoiser.architecture, config), height, width


def _load_weights(module: nn.Module, path: Path) -> None:
    saved = read_weights(path)
    # Buffers (SD3's table of positions) follow from the config: a file of what was trained has none.
    parameters = {name for name, _ in module.named_parameters()}
    own = {name: tensor for name, tensor in module.state_dict().items() if name in parameters or name in saved}
    problems = mismatches(own, saved)
    if problems:
        raise ValueError(f"model.weights: {path} does not fit the model: {'; '.join(problems)}")
    module.load_state_dict(saved, strict=False)
