"""Segmentation models: a timm backbone and a decoder (linear, SETR-PUP or UPerNet)."""

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from snell_scale.config import StrictModel
from snell_scale.interfaces import InputSpec, ModelBundle, Preprocessing
from snell_scale.models.segmentation.decoders.blocks import resized
from snell_scale.models.segmentation.decoders.linear import LinearDecoder
from snell_scale.models.segmentation.decoders.pyramids import NormalizedMaps, PyramidOfPlainMaps
from snell_scale.models.segmentation.decoders.setr_pup import setr_auxiliary, setr_pup
from snell_scale.models.segmentation.decoders.upernet import UPerNet, upernet_auxiliary
from snell_scale.models.segmentation.features import (
    FeatureMaps,
    default_indices,
    give_features,
    is_batch_normalized,
    strides_of,
    takes_any_size,
)
from snell_scale.models.timm.config import TimmConfig
from snell_scale.models.timm.structure import bundle_of, patch_size
from snell_scale.models.timm.weights import load_timm_weights

DecoderName = Literal["linear", "setr_pup", "upernet"]

_BACKBONE = "backbone"
_PARTS = ("pyramid", "decoder", "auxiliary")
# Where in a plain ViT's depth the maps are taken from: SETR's blocks 9, 14, 19 and 23 of 24 (counted from 0);
# UPerNet's 2, 5, 8 and 11 of 12.
_SHARES = {"linear": (1.0,), "setr_pup": (10 / 24, 15 / 24, 20 / 24, 1.0), "upernet": (0.25, 0.5, 0.75, 1.0)}
_CHANNELS = {"setr_pup": 256, "upernet": 512}
_DROPOUT = {"linear": 0.0, "setr_pup": 0.0, "upernet": 0.1}


class TimmSegmentationConfig(StrictModel):
    """A timm backbone without its head, and a decoder that gives logits for every pixel."""

    name: Literal["timm_segmentation"] = "timm_segmentation"
    architecture: str = Field(
        min_length=1,
        description="Of the backbone: any timm name, or 'vision_transformer'; as in the model 'timm'.",
    )
    arguments: dict[str, Any] = Field(default={}, description="Further arguments of the timm model.")
    weights: str | None = Field(
        default=None, description="Of the backbone: a file, 'pretrained', or null; as in the model 'timm'."
    )
    mean: tuple[float, ...] | None = Field(
        default=None, strict=False, description="What the weights expect, per channel; as in the model 'timm'."
    )
    std: tuple[float, ...] | None = Field(default=None, strict=False, description="As mean.")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        default=None, description="How images are resized; null: as timm's entry of the name says."
    )
    drop_path: float | None = Field(
        default=None, ge=0, lt=1, description="Stochastic depth of the backbone; null: timm's (0.1 in Swin)."
    )
    decoder: DecoderName = Field(
        default="linear",
        description="linear: norm and 1x1 convolution; setr_pup: on a plain ViT; upernet: on any backbone.",
    )
    indices: tuple[int, ...] | None = Field(
        default=None,
        description="Which of the backbone's feature maps (a ViT's blocks, others' stages), from 0; null: the "
        "last for linear, else four, as published.",
    )
    channels: int | None = Field(
        default=None, gt=0, description="Width of the decoder; null: 256 in setr_pup, 512 in upernet."
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="Of channels before the classifier; null: 0.1 in upernet, else 0."
    )
    auxiliary: bool = Field(
        default=True, description="Auxiliary heads for training: 3 in setr_pup, 1 in upernet, none in linear."
    )
    batch_norm: bool = Field(default=False, description="linear only: a batch norm before the convolution.")

    @model_validator(mode="after")
    def _check(self) -> "TimmSegmentationConfig":
        own = [key for key in ("drop_path_rate", "dynamic_img_size") if key in self.arguments]
        if own:
            raise ValueError(f"arguments has {own}: set model.drop_path; the image size follows from the data")
        if self.decoder == "linear" and self.channels is not None:
            raise ValueError("channels is set, but decoder=linear has none; remove it, or choose another decoder")
        if self.decoder != "linear" and self.batch_norm:
            raise ValueError(f"batch_norm is for decoder=linear; {self.decoder} has its own: remove it")
        expected = len(_SHARES[self.decoder])
        if self.indices is not None and len(self.indices) != expected:
            raise ValueError(f"indices has {len(self.indices)} entries, {self.decoder} takes {expected}")
        if self.indices is not None and list(self.indices) != sorted(self.indices):
            raise ValueError(f"indices is {list(self.indices)}, expected the earliest map first: sort them")
        try:
            self._backbone(weights=self.weights)
        except ValidationError as error:  # in TimmConfig's words, without pydantic's
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    def describe(self) -> str:
        """A short label for records and tables."""
        return f"{self._backbone(weights=self.weights).describe()} + {self.decoder}"

    def check(self) -> None:
        """ValueError where the architecture is unknown or the weights are not there; builds nothing."""
        self._backbone(weights=self.weights).check()

    def preprocessing(self) -> Preprocessing:
        """What the backbone's weights expect; the data decide the size of a crop."""
        return self._backbone(weights=self.weights).preprocessing()

    def build(self, *, num_classes: int, input_spec: InputSpec, seed: int) -> ModelBundle:
        """A `SegmentationModel` on the CPU (or the default device), its initial weights a function of `seed`.

        input_spec: of the crops; the position embeddings of `weights` are resampled to it as timm does. A file
        may be of a classifier, or of such a model as this, whose decoder is left out. Targets and blocks are
        the backbone's; the decoder is trained whole. ValueError: as TimmConfig.build; also a decoder that does
        not fit the backbone.
        """
        self.check()
        with torch.device("meta"):
            sketch = self._backbone(weights=None).build(num_classes=0, input_spec=input_spec, seed=seed).module
        indices, norm = self._fitting_indices(strides_of(sketch)), self.decoder == "linear"
        arguments = {"dynamic_img_size": True} if takes_any_size(sketch) else {}
        whole = sketch.state_dict().keys()
        give_features(sketch, indices, norm=norm)
        backbone = self._filled(
            arguments, input_spec=input_spec, seed=seed, unneeded=whole - sketch.state_dict().keys()
        )
        maps = give_features(backbone.module, indices, norm=norm)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"decoder {seed}").getrandbits(63))
            module = SegmentationModel(
                backbone.module,
                pyramid=self._pyramid(maps, backbone.module),
                decoder=self._decoder(maps.channels, num_classes),
                auxiliary=self._auxiliary(maps.channels, num_classes),
            )
        return _bundle(module, bundle_of(backbone.module, backbone.input_spec))

    def _backbone(self, arguments: Mapping[str, Any] | None = None, *, weights: str | None) -> TimmConfig:
        own = {**self.arguments, **(arguments or {})}
        if self.drop_path is not None:
            own["drop_path_rate"] = self.drop_path
        return TimmConfig(
            architecture=self.architecture,
            arguments=own,
            weights=weights,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
        )

    def _filled(
        self, arguments: Mapping[str, Any], *, input_spec: InputSpec, seed: int, unneeded: Collection[str]
    ) -> ModelBundle:
        """The whole backbone; a file of weights may have the tensors named in `unneeded`, or lack them.

        A classifier's have them, those of a segmentation model, itself without what it does not need, lack them.
        """
        is_file = self.weights not in (None, "pretrained")
        config = self._backbone(arguments, weights=None if is_file else self.weights)
        bundle = config.build(num_classes=0, input_spec=input_spec, seed=seed)
        if is_file:
            owners = {name.rpartition(".")[0] for name in unneeded}
            heads = (*bundle.head_modules, *sorted(owners))
            load_timm_weights(replace(bundle, head_modules=heads), Path(str(self.weights)), keep_head=False)
        return bundle

    def _fitting_indices(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        if self.decoder == "setr_pup" and len(set(strides)) > 1:
            raise ValueError(
                f"model.decoder is setr_pup, which stands on a plain ViT, but {self.architecture} gives maps of "
                f"strides {', '.join(map(str, strides))}; set model.decoder=upernet (or linear), or choose a ViT"
            )
        shares = _SHARES[self.decoder]
        if len(set(strides)) > 1 and len(strides) < len(shares):
            raise ValueError(
                f"model.decoder is {self.decoder}, which takes {len(shares)} maps, but {self.architecture} has "
                f"{len(strides)}; set model.decoder=linear"
            )
        return default_indices(strides, shares) if self.indices is None else self.indices

    def _pyramid(self, maps: FeatureMaps, backbone: nn.Module) -> nn.Module | None:
        if self.decoder == "upernet" and maps.is_plain:
            return PyramidOfPlainMaps(maps.channels)
        if self.decoder == "setr_pup" or maps.normalized or is_batch_normalized(backbone):
            return None
        return NormalizedMaps(maps.channels)

    def _decoder(self, in_channels: tuple[int, ...], num_classes: int) -> nn.Module:
        dropout = _DROPOUT[self.decoder] if self.dropout is None else self.dropout
        if self.decoder == "linear":
            return LinearDecoder(in_channels[-1], num_classes, batch_norm=self.batch_norm, dropout=dropout)
        channels = self.channels or _CHANNELS[self.decoder]
        if self.decoder == "setr_pup":
            return setr_pup(in_channels, num_classes, channels=channels, dropout=dropout)
        return UPerNet(in_channels, num_classes, channels=channels, dropout=dropout)

    def _auxiliary(self, in_channels: tuple[int, ...], num_classes: int) -> nn.Module | None:
        if not self.auxiliary or self.decoder == "linear":
            return None
        if self.decoder == "setr_pup":
            channels = self.channels or _CHANNELS[self.decoder]
            return setr_auxiliary(in_channels, num_classes, channels=channels)
        dropout = _DROPOUT[self.decoder] if self.dropout is None else self.dropout
        return upernet_auxiliary(in_channels, num_classes, dropout=dropout)


class SegmentationModel(nn.Module):
    """Backbone, pyramid (what fits its feature maps to the decoder), decoder, auxiliary heads.

    backbone: image → list of feature maps; see `features.give_features`. One whose maps fit needs no
    pyramid, and auxiliary heads serve training only.
    """

    def __init__(
        self, backbone: nn.Module, *, pyramid: nn.Module | None, decoder: nn.Module, auxiliary: nn.Module | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.decoder = decoder
        self.auxiliary = auxiliary

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """image (B, C, H, W), its sides multiples of the patch → logits (B, classes, H, W) in the compute dtype.

        In training mode, where there are auxiliary heads: (logits, one such tensor for each of them), whose
        losses are published with a weight of 0.4 each. ValueError: the patch does not divide the image.
        """
        size = image.shape[-2:]
        self._check_size(size)
        maps = self.backbone(image)
        if self.pyramid is not None:
            maps = self.pyramid(maps)
        logits = resized(self.decoder(maps), size)
        if self.auxiliary is None or not self.training:
            return logits
        return logits, tuple(resized(part, size) for part in self.auxiliary(maps))

    def _check_size(self, size: torch.Size) -> None:
        height, width = patch_size(self.backbone)
        if size[0] % height or size[1] % width:
            raise ValueError(
                f"an image of {size[0]}x{size[1]} pixels cannot be cut into patches of {height}x{width}; "
                "set data.image_size to a multiple of the patch; evaluate other sizes with task.inference=sliding"
            )


def _bundle(module: SegmentationModel, backbone: ModelBundle) -> ModelBundle:
    """The backbone's bundle below its name here, with the parts on it as heads."""
    heads = [name for name in _PARTS if getattr(module, name) is not None]
    return ModelBundle(
        module=module,
        wrap_points=_prefixed(backbone.wrap_points),
        target_groups={group: rf"{_BACKBONE}\.(?:{names})" for group, names in backbone.target_groups.items()},
        fused_groups=backbone.fused_groups,
        head_modules=tuple(heads),
        input_spec=backbone.input_spec,
        extra_trainable=_prefixed(backbone.extra_trainable),
        no_decay=frozenset(_prefixed(backbone.no_decay)),
        output="pixel_logits",
    )


def _prefixed(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{_BACKBONE}.{name}" for name in names)
