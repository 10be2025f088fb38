"""UPerNet (Xiao et al. 2018): pyramid pooling on the coarsest map, a feature pyramid above it, all fused."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from snell_scale.models.segmentation.decoders.blocks import AuxiliaryHeads, ConvNormRelu, PixelClassifier, resized

_POOL_SCALES = (1, 2, 3, 6)
_AUXILIARY_CHANNELS = 256
_AUXILIARY_PLACE = 2


class UPerNet(nn.Module):
    """Logits at the size of the finest of at least two maps.

    As configs/_base_/models/upernet_swin.py of open-mmlab/mmsegmentation. in_channels: of the maps, finest first.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, channels: int, dropout: float) -> None:
        super().__init__()
        self.pooling = PyramidPooling(in_channels[-1], channels)
        self.laterals = nn.ModuleList(ConvNormRelu(width, channels, kernel_size=1) for width in in_channels[:-1])
        self.smooth = nn.ModuleList(ConvNormRelu(channels, channels, kernel_size=3) for _ in in_channels[:-1])
        self.fuse = ConvNormRelu(len(in_channels) * channels, channels, kernel_size=3)
        self.classifier = PixelClassifier(channels, num_classes, dropout=dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """ValueError in training with one image: its pool of 1x1 gives a batch norm one value to learn from."""
        if self.training and len(maps[-1]) < 2:
            raise ValueError(
                "UPerNet trains on at least 2 images at once, as it normalises one pooled value per image over "
                "the batch; raise training.batch_size, or lower gradient_accumulation or the number of processes"
            )
        levels = [self.pooling(maps[-1])]  # finest first, once all are there
        for lateral, x in zip(self.laterals[::-1], maps[-2::-1], strict=True):
            levels.insert(0, lateral(x) + resized(levels[0], x.shape[-2:]))
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)]
        fused = [resized(x, levels[0].shape[-2:]) for x in (*smoothed, levels[-1])]
        return self.classifier(self.fuse(torch.cat(fused, dim=1)))


class PyramidPooling(nn.Module):
    """PSPNet's module (Zhao et al. 2017): averages over 1x1, 2x2, 3x3 and 6x6 fields beside the map itself."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormRelu(in_channels, channels, kernel_size=1))
            for scale in _POOL_SCALES
        )
        self.fuse = ConvNormRelu(in_channels + len(_POOL_SCALES) * channels, channels, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [resized(branch(x), x.shape[-2:]) for branch in self.branches]
        return self.fuse(torch.cat([x, *pooled], dim=1))


class FcnHead(nn.Module):
    """A 3x3 convolution and the classifier, on the last map (Long et al. 2015)."""

    def __init__(self, in_channels: int, num_classes: int, *, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv = ConvNormRelu(in_channels, channels, kernel_size=3)
        self.classifier = PixelClassifier(channels, num_classes, dropout=dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.conv(maps[-1]))


def upernet_auxiliary(in_channels: Sequence[int], num_classes: int, *, dropout: float) -> AuxiliaryHeads:
    """One fully convolutional head on the third of four maps (stride 16 of a hierarchical backbone)."""
    head = FcnHead(in_channels[_AUXILIARY_PLACE], num_classes, channels=_AUXILIARY_CHANNELS, dropout=dropout)
    return AuxiliaryHeads([(head, _AUXILIARY_PLACE)])
