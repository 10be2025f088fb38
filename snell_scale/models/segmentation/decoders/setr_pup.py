"""SETR's progressive upsampling decoder for a plain ViT (Zheng et al. 2021), and its auxiliary heads."""

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from snell_scale.models.segmentation.decoders.blocks import AuxiliaryHeads, ConvNormRelu, PixelClassifier, resized


class SetrPup(nn.Module):
    """Layer norm, `num_convs` times a 3x3 convolution and bilinear upsampling by `scale`, then the classifier.

    As configs/setr/setr_vit-l_pup_8xb2-160k_ade20k-512x512.py of open-mmlab/mmsegmentation: 4 times by 2. The
    last upsampling is left to who resizes the logits to the image: it mixes places and the classifier channels,
    so that their order makes no difference but in memory.
    """

    def __init__(
        self, in_channels: int, num_classes: int, *, channels: int, num_convs: int, scale: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm = LayerNorm2d(in_channels, eps=1e-6)
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.ModuleList(
            ConvNormRelu(before, after, kernel_size=3) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.classifier = PixelClassifier(channels, num_classes, dropout=dropout)
        self._scale = scale

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Of the last map: (B, classes, h·s, w·s) with s = scale^(num_convs - 1)."""
        x = self.norm(maps[-1])
        for i, conv in enumerate(self.convs):
            if i > 0:
                x = resized(x, [side * self._scale for side in x.shape[-2:]])
            x = conv(x)
        return self.classifier(x)


def setr_pup(in_channels: Sequence[int], num_classes: int, *, channels: int, dropout: float) -> SetrPup:
    """The decoder itself."""
    return SetrPup(in_channels[-1], num_classes, channels=channels, num_convs=4, scale=2, dropout=dropout)


def setr_auxiliary(in_channels: Sequence[int], num_classes: int, *, channels: int) -> AuxiliaryHeads:
    """One head for each map but the last: two convolutions, each followed by upsampling by 4."""
    heads = [
        SetrPup(width, num_classes, channels=channels, num_convs=2, scale=4, dropout=0.0)
        for width in in_channels[:-1]
    ]
    return AuxiliaryHeads([(head, place) for place, head in enumerate(heads)])
