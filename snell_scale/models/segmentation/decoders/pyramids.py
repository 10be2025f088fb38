"""What stands between a backbone's feature maps and a decoder that wants them normalised, or of several sizes."""

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn


class NormalizedMaps(nn.Module):
    """A layer norm for each map of a backbone that leaves its features as sums of residuals.

    As mmsegmentation's Swin and ConvNeXt have for each stage that they hand out.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(width, eps=1e-6) for width in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [norm(x) for norm, x in zip(self.norms, maps, strict=True)]


class PyramidOfPlainMaps(nn.Module):
    """Four maps of one size → 4, 2, 1 and 1/2 times that size: a pyramid for UPerNet out of a plain ViT's blocks.

    By transposed convolutions and max pooling, as BEiT, MAE and mmsegmentation's Feature2Pyramid.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        fourfold, twofold, *_ = channels
        self.levels = nn.ModuleList(
            [
                nn.Sequential(_doubled(fourfold), nn.BatchNorm2d(fourfold), nn.GELU(), _doubled(fourfold)),
                _doubled(twofold),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),  # of an odd size nothing is left out
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


def _doubled(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
