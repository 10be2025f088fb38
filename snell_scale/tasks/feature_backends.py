"""The models whose features generated images are judged by: local weights, checked before training starts."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from snell_scale.config import Config, StrictModel, resolve
from snell_scale.config_sources import read_yaml
from snell_scale.interfaces import InputSpec, Preprocessing
from snell_scale.registry import config_class

_INCEPTION = InputSpec(3, 299, 299, (0.5,) * 3, (0.5,) * 3, interpolation="bicubic")


@dataclass(frozen=True)
class FeatureModel:
    """A loaded backend. images: (B, 3, H, W) uint8 on any device, as an image file holds them.

    features: images → (B, D) float32. texts: sentences → (T, D), in the same space, unit length; None for models
    of images alone. logits: images → (B, classes), with `class_names`, of a classifier.
    """

    features: Callable[[Tensor], Tensor]
    texts: Callable[[Sequence[str]], Tensor] | None = None
    logits: Callable[[Tensor], Tensor] | None = None
    class_names: tuple[str, ...] = ()


class FeatureBackendConfig(StrictModel):
    """Whose features FID and KID compare, or similarities are taken in; the numbers of two backends differ."""

    name: Literal["inception", "clip", "dino", "classifier"] = Field(
        description="inception: the 2048 features of the published FID; classifier: one trained by this project."
    )
    weights: str = Field(min_length=1, description="A local file.")
    architecture: str | None = Field(
        default=None, description="clip: open_clip's name; dino: timm's name, e.g. vit_base_patch14_dinov2."
    )
    options: dict[str, Any] = Field(
        default={},
        description="clip, dino: further keys of this project's model open_clip, timm (tag, arguments).",
    )
    config: str | None = Field(default=None, description="classifier: the YAML file of the run that trained it.")

    @model_validator(mode="after")
    def _check(self) -> "FeatureBackendConfig":
        needed = {"clip": "architecture", "dino": "architecture", "classifier": "config"}.get(self.name)
        for key in ("architecture", "config"):
            given = getattr(self, key) is not None
            if given != (key == needed):
                advice = f"set {key}" if not given else f"remove {key}"
                raise ValueError(f"feature backend {self.name}: {advice}")
        if self.options and needed != "architecture":
            raise ValueError(f"feature backend {self.name}: options are for clip and dino; remove them")
        return self

    def check(self, key: str) -> FeatureModel:
        """The backend on the CPU. ValueError, naming the config's `key`, where its files are absent or wrong."""
        for name, file in (("weights", self.weights), ("config", self.config)):
            if file is not None and not Path(file).is_file():
                raise ValueError(
                    f"task.{key}.{name}: there is no file {file} (looked for from {Path.cwd()}); nothing is "
                    f"downloaded: put the {name} there, or set task.{key}=null to do without these metrics"
                )
        try:
            return self.load(torch.device("cpu"))
        except ImportError as error:
            raise ValueError(
                f"task.{key}: the backend {self.name} needs a package that is missing ({error}); "
                "pip install snell-scale[diffusion], and [clip] for clip"
            ) from error

    def load(self, device: torch.device) -> FeatureModel:
        """The backend on `device`, frozen."""
        loaders = {"inception": _inception, "clip": _clip, "dino": _dino, "classifier": _classifier}
        return loaders[self.name](self, device)

    def describe(self) -> str:
        """For the record: name, weights with the start of their SHA-256, and how images are resized."""
        with Path(self.weights).open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        what = " ".join(part for part in (self.name, self.architecture) if part)
        return f"{what} ({self.weights}, sha256 {digest.hexdigest()[:12]}, antialiased resize)"


def as_input(images: Tensor, spec: InputSpec) -> Tensor:
    """uint8 images → (B, C, height, width) float32, as a model with this `spec` expects them.

    Resized with antialiasing: without, as torch-fidelity and the first FID code resize, an FID says as much about
    the filter as about the images (Parmar et al., arXiv 2104.11222).
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    mode = InterpolationMode(spec.interpolation)
    sized = resize(images, [spec.height, spec.width], interpolation=mode, antialias=True).float() / 255
    if spec.channels == 1:
        sized = sized.mean(dim=1, keepdim=True)
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
    return (sized - mean) / std


def _inception(config: FeatureBackendConfig, device: torch.device) -> FeatureModel:
    """torch-fidelity's InceptionV3, which resizes without antialiasing: it gets images of its own size.

    It would also unpickle whatever a weights file holds: the file is read as tensors alone, and written anew.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state = torch.load(config.weights, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "inception.pth"
        torch.save(state, copy)
        try:
            module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(copy)).to(device)
        except RuntimeError as error:
            raise ValueError(f"{config.weights} does not fit torch-fidelity's InceptionV3: {error}") from error

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        own_size = (as_input(images.to(device), _INCEPTION) * 127.5 + 127.5).round().clamp(0, 255)
        return module(own_size.to(torch.uint8))[0].float()

    return FeatureModel(features)


def _clip(config: FeatureBackendConfig, device: torch.device) -> FeatureModel:
    module, spec, preprocessing = _of_project("open_clip", config, device)
    tokenize = preprocessing.tokenize
    assert tokenize is not None, "a CLIP model reads text"

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return module(as_input(images.to(device), spec), None)[0].float()

    @torch.no_grad()
    def texts(sentences: Sequence[str]) -> Tensor:
        return module(None, tokenize(sentences).to(device))[1].float()

    return FeatureModel(features, texts=texts)


def _dino(config: FeatureBackendConfig, device: torch.device) -> FeatureModel:
    module, spec, _ = _of_project("timm", config, device)
    return FeatureModel(_pooled(module, spec, device))


def _of_project(
    library: str, config: FeatureBackendConfig, device: torch.device
) -> tuple[nn.Module, InputSpec, Preprocessing]:
    """One of this project's models, frozen, and what it expects of its input."""
    own = {"name": library, "architecture": config.architecture, "weights": config.weights}
    model = config_class("model", library).model_validate({**config.options, **own})
    preprocessing = model.preprocessing()
    if preprocessing.image is None:
        raise ValueError(
            f"{config.architecture} does not say what images it was trained on; name a published one"
        )
    bundle = model.build(num_classes=2, input_spec=preprocessing.image, seed=0)
    return bundle.module.to(device).eval().requires_grad_(False), bundle.input_spec, preprocessing


def _classifier(config: FeatureBackendConfig, device: torch.device) -> FeatureModel:
    """A timm classifier that a run of this project trained whole: penultimate features, and classes."""
    assert config.config is not None
    trained: Config = resolve(read_yaml(config.config), [], config_class=config_class, source=config.config)
    model = type(trained.model).model_validate(
        trained.model.model_dump() | {"weights": config.weights, "head": "keep"}
    )
    data = trained.data.build(seed=trained.data_seed, preprocessing=model.preprocessing())
    bundle = model.build(num_classes=len(data.class_names), input_spec=data.input_spec, seed=0)
    if bundle.output != "class_logits":
        raise ValueError(f"{config.config} is the config of a model that gives {bundle.output}, not class_logits")
    module = bundle.module.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        return module(as_input(images.to(device), bundle.input_spec)).float()

    features = _pooled(module, bundle.input_spec, device)
    return FeatureModel(features, logits=logits, class_names=data.class_names)


def _pooled(module: Any, spec: InputSpec, device: torch.device) -> Callable[[Tensor], Tensor]:
    """timm's features before the classifier."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        maps = module.forward_features(as_input(images.to(device), spec))
        return module.forward_head(maps, pre_logits=True).float()

    return features
