"""What the decoders are made of: convolution with batch norm, classifier, bilinear resizing, auxiliary heads.

Batch norms are plain ones where the publications synchronise theirs: in training they see one rank's microbatch,
and the engines average what they remember of it.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate


class ConvNormRelu(nn.Sequential):
    """Convolution without bias that keeps the size, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class PixelClassifier(nn.Sequential):
    """Dropout of whole channels, then a 1x1 convolution to the classes that starts near zero."""

    def __init__(self, in_channels: int, num_classes: int, *, dropout: float) -> None:
        conv = nn.Conv2d(in_channels, num_classes, 1)
        nn.init.normal_(conv.weight, std=0.01)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        super().__init__(nn.Dropout2d(dropout), conv)


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) → (B, C, *size), bilinear, align_corners=False, as in all the publications followed here."""
    height, width = size
    return interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)


class AuxiliaryHeads(nn.Module):
    """Heads that look at earlier feature maps, whose losses help training and nothing else.

    heads: head → the place of its map among those of the backbone. Each takes one map, as a list of one.
    """

    def __init__(self, heads: Sequence[tuple[nn.Module, int]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList([head for head, _ in heads])
        self._places = [place for _, place in heads]

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(head([maps[place]]) for head, place in zip(self.heads, self._places, strict=True))
