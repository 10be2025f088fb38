"""What the configs of all data sets share, and how their splits become a bundle."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from snell_scale.config import StrictModel
from snell_scale.data.batches import num_samples
from snell_scale.interfaces import Batch, DataBundle, InputSpec


class DataConfig(StrictModel):
    """Base of every data set's config, which also has `build(*, seed, preprocessing) -> DataBundle`."""

    name: str

    def describe(self) -> str:
        """The data set's name in records and tables."""
        return self.name

    def check_run(self, config: Any) -> None:
        """ValueError where the rest of the run's config does not go with these data."""
        return None


def bundle_of(
    splits: Mapping[str, Dataset[Batch]],
    *,
    class_names: Sequence[str],
    input_spec: InputSpec,
    fields: Collection[str],
    captions: Sequence[str] = (),
    skipped: Sequence[str] = (),
) -> DataBundle:
    """The bundle of the splits "train", "validation" and "test", with their sizes."""
    return DataBundle(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        class_names=tuple(class_names),
        input_spec=input_spec,
        sizes={name: num_samples(split) for name, split in splits.items()},
        fields=frozenset(fields),
        captions=tuple(captions),
        skipped=tuple(skipped),
    )
