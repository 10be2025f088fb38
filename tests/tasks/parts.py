"""Data and models for tests of tasks: as little as a task looks at."""

from typing import cast

from torch import nn
from torch.utils.data import Dataset

from snell_scale.interfaces import Batch, DataBundle, InputSpec, ModelBundle, ModelOutput


class Samples(Dataset[Batch]):
    """A split of ready-made samples."""

    def __init__(self, samples: list[Batch]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return self._samples[key[0]]


def data_of(
    *,
    class_names: list[str],
    fields: set[str],
    samples: list[Batch] | None = None,
    channels: int = 3,
    size: int = 8,
) -> DataBundle:
    """A bundle whose three splits hold the same samples."""
    split = Samples(samples or [])
    return DataBundle(
        train=split,
        validation=split,
        test=split,
        class_names=tuple(class_names),
        input_spec=InputSpec(channels, size, size, (0.5,) * channels, (0.5,) * channels),
        sizes=dict.fromkeys(("train", "validation", "test"), len(split)),
        fields=frozenset(fields),
    )


def model_of(output: str, module: nn.Module | None = None) -> ModelBundle:
    """A bundle of a module that gives `output`."""
    return ModelBundle(
        module=module or nn.Identity(),
        wrap_points=(),
        target_groups={},
        fused_groups={},
        head_modules=(),
        input_spec=InputSpec(3, 8, 8, (0.5,) * 3, (0.5,) * 3),
        output=cast(ModelOutput, output),
    )
