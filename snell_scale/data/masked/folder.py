"""From pairs of image and mask files to a data bundle: what all segmentation data in folders have in common."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from snell_scale.data.config import DataConfig, bundle_of
from snell_scale.data.images import printable
from snell_scale.data.masked.files import Labels, Pair, SegmentationFiles, Transform, check_apart, sift
from snell_scale.data.masked.transforms import EvaluationTransform, MaskSize, Resizing, TrainingTransform
from snell_scale.interfaces import DataBundle, InputSpec, Preprocessing

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SegmentationFolder(DataConfig):
    """What data sets of image and mask files have in common: sizes, augmentation, the validation split."""

    root: str = Field(min_length=1, description="The data set's folder.")
    image_size: int | None = Field(
        default=None, gt=0, description="Pixels of a training crop's side; null: what the model's weights expect."
    )
    base_size: int | None = Field(
        default=None, gt=0, description="Shorter side before the random resizing; null: image_size."
    )
    resize_range: tuple[float, float] = Field(
        default=(0.5, 2.0), description="Training images are resized by a random factor between these."
    )
    largest_class_share: float = Field(
        default=0.75, gt=0, le=1, description="A crop of which one class has more is drawn again; 1: never."
    )
    flip: bool = Field(default=True, description="Training images are mirrored half of the time.")
    photometric: bool = Field(default=False, description="mmseg's random brightness, contrast, saturation, hue.")
    evaluation_resize: Resizing = Field(
        default="keep_ratio",
        description="keep_ratio: the shorter side to evaluation_size; squash: to the training crop's size; none.",
    )
    evaluation_size: int | None = Field(default=None, gt=0, description="Pixels; null: base_size.")
    evaluation_masks: MaskSize = Field(
        default="original",
        description="Metrics over the masks as they are, as published, or resized as the images.",
    )
    validation_fraction: float = Field(gt=0, lt=1, description="Share of the training images; by data_seed.")
    skip_broken: bool = Field(
        default=False,
        description="Read every file first, and leave out those that cannot be used, with a record.",
    )

    @model_validator(mode="after")
    def _check_range(self) -> "SegmentationFolder":
        smallest, largest = self.resize_range
        if not 0 < smallest <= largest:
            raise ValueError(f"resize_range={[smallest, largest]}, expected [smallest, largest] factors above 0")
        return self

    def describe(self) -> str:
        """For the record."""
        return f"{self.model_dump()['name']} ({Path(self.root).name})"

    def _bundle(
        self, splits: dict[str, list[Pair]], labels: Labels, *, seed: int, preprocessing: Preprocessing
    ) -> DataBundle:
        spec = self._spec(preprocessing)
        check_apart(splits)
        skipped: list[str] = []
        if self.skip_broken:
            splits, skipped = sift(splits, labels, channels=spec.channels)
        for split, pairs in splits.items():
            if not pairs:
                raise ValueError(
                    f"data.root {printable(self.root)}: no images for the {split} split; add images, or change "
                    "the data's fractions"
                )
        evaluated = EvaluationTransform(
            spec, self.evaluation_resize, self.evaluation_size or self._base(spec), self.evaluation_masks
        )
        transforms: dict[str, Transform] = {
            "train": self._training_transform(spec),
            "validation": evaluated,
            "test": evaluated,
        }
        made = {
            split: SegmentationFiles(
                pairs, labels, transform=transforms[split], channels=spec.channels, seed=seed
            )
            for split, pairs in splits.items()
        }
        return bundle_of(
            made,
            class_names=labels.class_names,
            input_spec=spec,
            fields={"image", "mask"},
            skipped=skipped,
        )

    def _spec(self, preprocessing: Preprocessing) -> InputSpec:
        known = preprocessing.image
        if self.image_size is None and known is None:
            raise ValueError("data.image_size is not set, and the model does not say what it expects; set it")
        if known is None:
            size = self.image_size or 0
            return InputSpec(3, size, size, _IMAGENET_MEAN, _IMAGENET_STD)
        height, width = (self.image_size, self.image_size) if self.image_size else (known.height, known.width)
        return InputSpec(known.channels, height, width, known.mean, known.std, known.interpolation)

    def _base(self, spec: InputSpec) -> int:
        return self.base_size or min(spec.height, spec.width)

    def _training_transform(self, spec: InputSpec) -> TrainingTransform:
        return TrainingTransform(
            spec,
            base_size=self._base(spec),
            resize_range=self.resize_range,
            largest_share=self.largest_class_share,
            flip=self.flip,
            photometric=self.photometric,
        )


def divided(pairs: Sequence[Pair], fractions: Sequence[float], *, seed: int) -> list[list[Pair]]:
    """[the rest, a part for each fraction], chosen by `seed`, each in the order of `pairs`.

    ValueError where a part, or the rest, would be empty.
    """
    numbers = [max(round(fraction * len(pairs)), 1) for fraction in fractions]
    rest = len(pairs) - sum(numbers)
    if rest < 1:
        raise ValueError(
            f"{len(pairs)} image(s) cannot be divided into training and {' and '.join(map(str, numbers))} for "
            "validation (and test): nothing would be left; add images, or lower the data's fractions"
        )
    order = np.random.default_rng([seed]).permutation(len(pairs))
    parts = np.split(order, np.cumsum([rest, *numbers])[:-1])
    return [[pairs[index] for index in sorted(part.tolist())] for part in parts]
