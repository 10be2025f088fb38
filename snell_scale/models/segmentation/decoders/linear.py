"""The linear decoder: one 1x1 convolution on the last feature map."""

from collections.abc import Sequence

from torch import Tensor, nn

from snell_scale.models.segmentation.decoders.blocks import PixelClassifier


class LinearDecoder(nn.Module):
    """Logits of the last map, (B, classes, h, w), as linear as can be.

    Published for a plain ViT as the encoder's final norm and one linear layer per patch (Segmenter, Strudel et
    al. 2021, "Linear"), and with a batch norm between them (DINOv2, Oquab et al. 2023). The final norm is the
    backbone's.
    """

    def __init__(self, channels: int, num_classes: int, *, batch_norm: bool, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.classifier = PixelClassifier(channels, num_classes, dropout=dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.norm(maps[-1]))
