"""What a training step is given, by shape alone: classes and image size, and a batch without values."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from snell_scale.config import Config
from snell_scale.data.latents import CONDITION
from snell_scale.interfaces import Batch, DataBundle, InputSpec, ModelBundle

_NUM_CAPTIONS = 5
_HALF = 0.5


@dataclass(frozen=True)
class Inputs:
    """What of the data decides a step's memory. images_per_sample: 2 where prior preservation pairs images."""

    num_classes: int
    image: InputSpec
    images_per_sample: int = 1


def inputs_of(config: Config, num_classes: int | None) -> Inputs:
    """From the data where they are at hand; with num_classes from the config alone, and no data are read.

    ValueError where the data cannot be read, or nothing says how large an image is.
    """
    # Mean and std are the weights' own; sizes are not.
    preprocessing = without_weights(config.model).preprocessing()
    if num_classes is not None:
        return Inputs(num_classes, _image(config, preprocessing.image), _images_per_sample(config))
    try:
        data: DataBundle = config.data.build(seed=config.data_seed, preprocessing=preprocessing)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}\nThe estimate needs of the data how many classes there are and how large an image is: give "
            "--num-classes N, and no data are read"
        ) from error
    return Inputs(len(data.class_names), data.input_spec, _images_per_sample(config))


def without_weights(model: Any) -> Any:
    """The same model as its sizes alone: no file is looked for."""
    return model.model_copy(update={"weights": None})


def batch_like(bundle: ModelBundle, inputs: Inputs, *, num_samples: int) -> Batch:
    """A batch of the shapes and dtypes that the bundle's task is given, on the current device, not filled."""
    spec, size = inputs.image, num_samples * inputs.images_per_sample
    if bundle.output == "denoised":
        return _noised(bundle, size)
    image = torch.empty(size, spec.channels, spec.height, spec.width)
    if bundle.output == "pixel_logits":
        return {"image": image, "mask": torch.zeros(size, spec.height, spec.width, dtype=torch.int64)}
    if bundle.output == "image_text_features":
        numbers = {name: _number(size) for name in ("index", "caption", "image_id")}
        return {"image": image, "text": torch.zeros(size, _text_length(bundle), dtype=torch.int64), **numbers}
    return {"image": image, "label": _number(size)}


def _noised(bundle: ModelBundle, size: int) -> Batch:
    assert bundle.diffusion is not None, "a model that denoises brings the shape of its latents"
    shape = (size, *bundle.diffusion.latent_shape)
    condition = {name: (size, *each) for name, each in bundle.diffusion.condition_shapes.items()}
    integers = {name for name in condition if name.endswith("_mask")}
    return {
        "latents": torch.empty(shape),
        "noise": torch.empty(shape),
        "fraction": torch.empty(size),
        "weight": torch.empty(size),
        "prompt": _number(size),
        "index": _number(size),
        **{
            CONDITION + name: torch.empty(each, dtype=torch.int64 if name in integers else torch.float32)
            for name, each in condition.items()
        },
    }


def _number(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int64)


def _text_length(bundle: ModelBundle) -> int:
    length: Any = getattr(bundle.module, "context_length", None)
    assert isinstance(length, int), "open_clip's models say how long a text is"
    return length


def _images_per_sample(config: Config) -> int:
    return 2 if getattr(config.data, "class_folder", None) else 1


def _image(config: Config, expected: InputSpec | None) -> InputSpec:
    """As the data would be made: of the size that they state, or else of the one that the model expects."""
    side = getattr(config.data, "image_size", None)
    if side is None and expected is None:
        raise ValueError(
            "neither the model nor data.image_size says how large an image is: set data.image_size, or leave "
            "--num-classes out, and the data are read"
        )
    if side is None:
        return cast(InputSpec, expected)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    if expected is not None:
        return replace(expected, height=height, width=width)
    channels = getattr(config.data, "channels", 3)
    half = (_HALF,) * channels
    return InputSpec(channels, height, width, half, half)
