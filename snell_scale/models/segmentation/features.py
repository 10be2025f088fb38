"""A timm backbone as what a decoder stands on: which feature maps it gives, and nothing that they do not need."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class FeatureMaps:
    """What a backbone's forward gives, finest or earliest first: channels and stride (pixels) of each map.

    normalized: whether the last one has been through a norm of the backbone's.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    normalized: bool

    @property
    def is_plain(self) -> bool:
        """One stride throughout, as a ViT's; otherwise hierarchical, as Swin's, ConvNeXt's or a ResNet's."""
        return len(set(self.strides)) == 1


def takes_any_size(backbone: nn.Module) -> bool:
    """Whether it has timm's `dynamic_img_size`: positions are resampled, or windows masked, as images come."""
    return any("dynamic_img_size" in inspect.signature(cls).parameters for cls in _ancestors(backbone))


def strides_of(backbone: nn.Module) -> tuple[int, ...]:
    """Stride in pixels of each feature map that the backbone can give."""
    return tuple(int(level["reduction"]) for level in _levels(backbone))


def give_features(backbone: nn.Module, indices: Sequence[int], *, norm: bool) -> FeatureMaps:
    """Make the backbone's forward give the maps of these indices, in their order, as a list; in place.

    What they do not need is taken out, so that every parameter that is left has a gradient. There is no class
    token in the maps. norm: the last map goes through the backbone's final norm, where it has one.
    ValueError: there is no map of such an index.
    """
    levels = _levels(backbone)
    wrong = [index for index in indices if not 0 <= index < len(levels)]
    if wrong:
        raise ValueError(
            f"model.indices has {wrong}, but this backbone's {len(levels)} feature maps count from 0 to "
            f"{len(levels) - 1}"
        )
    channels = tuple(int(levels[index]["num_chs"]) for index in indices)
    strides = tuple(int(levels[index]["reduction"]) for index in indices)
    has_norm = not isinstance(getattr(backbone, "norm", nn.Identity()), nn.Identity)
    # Of a hierarchical backbone the final norm is made for the last stage's width, and is applied to it alone.
    norm = norm and has_norm and (len(set(strides_of(backbone))) == 1 or indices[-1] == len(levels) - 1)
    model = cast(Any, backbone)  # timm declares these methods on each class, and on no common one
    model.prune_intermediate_layers(sorted(set(indices)), prune_norm=not norm, prune_head=True)
    # The instance attribute shadows the method: names stay as they are, and hooks on the backbone see its calls.
    backbone.forward = partial(_feature_maps, backbone, tuple(indices), norm)
    return FeatureMaps(channels, strides, normalized=norm)


def default_indices(strides: Sequence[int], shares: Sequence[float]) -> tuple[int, ...]:
    """The maps at these shares of a plain backbone's depth; of a hierarchical one's, as many of the last."""
    if len(set(strides)) == 1:
        return tuple(max(math.ceil(share * len(strides)), 1) - 1 for share in shares)
    return tuple(range(len(strides)))[-len(shares) :]


def is_batch_normalized(backbone: nn.Module) -> bool:
    """Whether features come out of batch norms, as a ResNet's, and need no other norm."""
    return any(isinstance(child, _BatchNorm) for child in backbone.modules())


def _feature_maps(backbone: nn.Module, indices: tuple[int, ...], norm: bool, image: Tensor) -> list[Tensor]:
    taken = sorted(set(indices))  # a backbone of few blocks may give one map twice
    maps = cast(Any, backbone).forward_intermediates(
        image, indices=taken, norm=norm, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    return [maps[taken.index(index)] for index in indices]


def _levels(backbone: nn.Module) -> list[dict[str, Any]]:
    return list(cast(Any, backbone).feature_info)


def _ancestors(module: nn.Module) -> list[type[nn.Module]]:
    """Its class and those above it, of which one may hand on arguments that it does not name."""
    return [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
