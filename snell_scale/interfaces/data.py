"""What data sets give, and what one input looks like."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor
from torch.utils.data import Dataset

Batch: TypeAlias = dict[str, Tensor]
SampleKey: TypeAlias = tuple[int, int]
"""(index, epoch): a sample's augmentation is a function of both, so that a resumed run sees the same images."""

IGNORED_PIXEL = 255
"""The label of pixels that belong to no class: they train nothing and are counted nowhere."""


@dataclass(frozen=True)
class InputSpec:
    """What one input image looks like: size in pixels, and the normalisation that the weights expect.

    interpolation: Pillow's name of the filter that images are resized with; crop_fraction: what of an evaluation
    image's shorter side the centre crop keeps.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_fraction: float = 1.0


@dataclass(frozen=True)
class Preprocessing:
    """What a model's weights expect of their input; known before any data are read.

    image: None where the data decide. tokenize: N captions → (N, length) int64; None where no text is read.
    """

    image: InputSpec | None = None
    tokenize: Callable[[Sequence[str]], Tensor] | None = None


@dataclass(frozen=True)
class DataBundle:
    """Three disjoint splits, indexed by `SampleKey`: train fits, validation chooses, test reports, once.

    fields: the names of the entries of a sample, which a task checks before anything is computed:
      image: (C, H, W) float32, normalised as `input_spec` says
      label: () int64, a class
      mask: (H, W) int64, a class per pixel, or IGNORED_PIXEL
      text: (length,) int64, the tokens of a caption; caption: () int64, which of `captions` it is
      index: () int64, the sample's place in its split; image_id: () int64, equal for captions of one image
    skipped: files that could not be read and that the user said to leave out.
    """

    train: Dataset[Batch]
    validation: Dataset[Batch]
    test: Dataset[Batch]
    class_names: tuple[str, ...]
    input_spec: InputSpec
    sizes: Mapping[str, int] = field(default_factory=dict)
    fields: frozenset[str] = frozenset({"image", "label"})
    captions: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
