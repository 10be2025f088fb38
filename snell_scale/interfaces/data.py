"""What data sets give, and what one input looks like."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor
from torch.utils.data import Dataset

Batch: TypeAlias = dict[str, Tensor]
SampleKey: TypeAlias = tuple[int, int]
"""(index, epoch): a sample's augmentation is a function of both, so that a resumed run sees the same images."""


@dataclass(frozen=True)
class InputSpec:
    """What one input image looks like: size in pixels, and the normalisation that the weights expect."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class DataBundle:
    """Three disjoint splits, indexed by `SampleKey`: train fits, validation chooses, test reports, once."""

    train: Dataset[Batch]
    validation: Dataset[Batch]
    test: Dataset[Batch]
    class_names: tuple[str, ...]
    input_spec: InputSpec
    sizes: Mapping[str, int] = field(default_factory=dict)
