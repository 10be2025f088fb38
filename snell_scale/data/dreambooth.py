"""DreamBooth's data: a few images of one subject, and of its class, so that the model does not forget that."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from snell_scale.data.config import DataConfig
from snell_scale.data.images import SUFFIXES, printable, read_image
from snell_scale.data.latents import PriorPreserving
from snell_scale.interfaces import Batch, DataBundle, InputSpec, Preprocessing, SampleKey

_INSTANCE, _CLASS = 0, 1


class DreamBoothConfig(DataConfig):
    """A folder of images of one subject and its prompt; with prior preservation, one of its class."""

    name: Literal["dreambooth"] = "dreambooth"
    instance_folder: str = Field(description="Images of the subject.")
    instance_prompt: str = Field(min_length=1, description="With a rare word for it: 'a photo of sks dog'.")
    class_folder: str | None = Field(
        default=None, description="Images of its class; null: no prior preservation."
    )
    class_prompt: str | None = Field(default=None, description="'a photo of a dog'.")
    prior_weight: float = Field(default=1.0, gt=0, description="Of the loss on the images of the class.")
    num_class_images: int = Field(
        default=100, gt=0, description="How many the class folder must have; used are all."
    )
    image_size: int | None = Field(default=None, gt=0, description="Pixels; null: what the model was made for.")
    validation_count: int = Field(default=1, gt=0, description="Instance images kept from training, to choose.")
    test_count: int = Field(default=1, gt=0, description="Instance images kept from training, to report.")

    @model_validator(mode="after")
    def _check(self) -> "DreamBoothConfig":
        if (self.class_folder is None) != (self.class_prompt is None):
            raise ValueError("class_folder and class_prompt belong together: give both, or neither")
        if self.class_prompt == self.instance_prompt:
            raise ValueError("class_prompt equals instance_prompt: the subject's needs a word of its own")
        return self

    def describe(self) -> str:
        """For the record."""
        return f"{self.name}({Path(self.instance_folder).name})"

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        """Splits of the instance images chosen by `seed`; the class images are for training alone.

        ValueError: folders that are absent or hold too few images, or no size that images are to have.
        """
        spec = self._input_spec(preprocessing)
        files = _images_of(self.instance_folder, "data.instance_folder")
        held_out = self.validation_count + self.test_count
        if len(files) <= held_out:
            raise ValueError(
                f"data.instance_folder: {printable(self.instance_folder)} has {len(files)} images, of which "
                f"{self.validation_count} (data.validation_count) and {self.test_count} (data.test_count) are "
                f"not trained on; expected at least {held_out + 1}: add images"
            )
        order = np.random.default_rng(seed).permutation(len(files))
        chosen = [files[index] for index in order]
        parts = {
            "validation": chosen[: self.validation_count],
            "test": chosen[self.validation_count : held_out],
            "train": chosen[held_out:],
        }
        splits = {name: FolderImages(part, spec, caption=_INSTANCE) for name, part in parts.items()}
        train = self._with_prior(splits["train"], spec)
        captions = (
            (self.instance_prompt,) if self.class_prompt is None else (self.instance_prompt, self.class_prompt)
        )
        return DataBundle(
            train=train,
            validation=splits["validation"],
            test=splits["test"],
            class_names=("instance", "class")[: len(captions)],
            input_spec=spec,
            sizes={name: len(split) for name, split in splits.items()},
            fields=frozenset({"image", "caption", "index"}),
            captions=captions,
        )

    def _with_prior(self, instances: "FolderImages", spec: InputSpec) -> Dataset[Batch]:
        if self.class_folder is None:
            return instances
        files = _images_of(self.class_folder, "data.class_folder")
        if len(files) < self.num_class_images:
            raise ValueError(
                f"data.class_folder: {printable(self.class_folder)} has {len(files)} images, expected at least "
                f"{self.num_class_images} (data.num_class_images); put images of {self.class_prompt!r} there: "
                "usually ones that the model itself makes of this prompt before it is trained"
            )
        return PriorPreserving(
            instances, FolderImages(files, spec, caption=_CLASS), prior_weight=self.prior_weight
        )

    def _input_spec(self, preprocessing: Preprocessing | None) -> InputSpec:
        expected = preprocessing.image if preprocessing else None
        size = self.image_size or (expected.height if expected else None)
        if size is None:
            raise ValueError("data.image_size is missing, and the model does not say which size it was made for")
        channels = expected.channels if expected else 3
        return InputSpec(channels, size, size, (0.5,) * channels, (0.5,) * channels, interpolation="lanczos")


class FolderImages(Dataset[Batch]):
    """Image files, all with one caption, as the centre square of each, in [-1, 1]; the same in every epoch."""

    def __init__(self, files: list[Path], spec: InputSpec, *, caption: int) -> None:
        self._files = files
        self._spec = spec
        self._caption = caption

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, key: SampleKey) -> Batch:
        index, _ = key
        file = self._files[index]
        image = read_image(file, name=str(file), channels=self._spec.channels)
        return {
            "image": _centre_square(image, self._spec),
            "caption": torch.tensor(self._caption),
            "index": torch.tensor(index),
        }


def _centre_square(image: Image.Image, spec: InputSpec) -> Tensor:
    """(C, size, size) float32 in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.resize(
        (spec.width, spec.height), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    pixels = torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1)
    return pixels.reshape(spec.height, spec.width, spec.channels).permute(2, 0, 1).contiguous()


def _images_of(folder: str, key: str) -> list[Path]:
    """Its image files in the order of their names. ValueError where there is no folder or no image."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{key}: there is no folder {printable(folder)} (looked for from {Path.cwd()})")
    files = sorted(
        file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(
            f"{key}: {printable(folder)} has no images; expected files ending in {', '.join(sorted(SUFFIXES))}"
        )
    return files
