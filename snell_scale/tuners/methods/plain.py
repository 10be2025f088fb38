"""Methods that train some of the model's own parameters and add none: linear probe, BitFit, full fine-tuning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from snell_scale.interfaces import ModelBundle
from snell_scale.tuners.methods.base import MethodConfig, ModuleTuner, always_trained, train_only
from snell_scale.tuners.methods.trained_file import write_trained


class ProbeConfig(MethodConfig):
    """Linear probe: the head alone. Ignores r and targets."""

    name: Literal["probe"] = "probe"

    def apply(
        self, bundle: ModelBundle, *, total_steps: int, steps_per_epoch: int, seed: int
    ) -> "OwnParametersTuner":
        if not bundle.head_modules:
            raise ValueError(
                "method.name=probe trains the head alone, and this model has none (a CLIP tells classes by their "
                "names): choose another method, e.g. method.name=bias or lora"
            )
        train_only(bundle.module, always_trained(bundle, train_extra=self.train_extra))
        return OwnParametersTuner(bundle, settings=self.model_dump(mode="json"))


class BiasConfig(MethodConfig):
    """BitFit: every bias (that the model does not fix itself) and the head. Ignores r and targets."""

    name: Literal["bias"] = "bias"

    def apply(
        self, bundle: ModelBundle, *, total_steps: int, steps_per_epoch: int, seed: int
    ) -> "OwnParametersTuner":
        parameters = bundle.module.named_parameters()
        biases = {name for name, p in parameters if name.endswith("bias") and p.requires_grad}
        train_only(bundle.module, biases | always_trained(bundle, train_extra=self.train_extra))
        return OwnParametersTuner(bundle, settings=self.model_dump(mode="json"))


class FullConfig(MethodConfig):
    """Full fine-tuning: every parameter. Ignores r, targets and train_extra."""

    name: Literal["full"] = "full"

    def apply(
        self, bundle: ModelBundle, *, total_steps: int, steps_per_epoch: int, seed: int
    ) -> "OwnParametersTuner":
        # Nothing is unfrozen: what a model itself fixes (sine position embeddings) is no parameter to tune.
        return OwnParametersTuner(bundle, settings=self.model_dump(mode="json"), saves_all=True)


class OwnParametersTuner(ModuleTuner):
    """Trains the parameters of the model that require a gradient; saves them, or the whole model."""

    def __init__(self, bundle: ModelBundle, *, settings: Mapping[str, Any], saves_all: bool = False) -> None:
        super().__init__(bundle.module, no_decay=bundle.no_decay)
        self._settings = settings
        self._saves_all = saves_all

    def saved_names(self) -> list[str]:
        return list(self.module.state_dict()) if self._saves_all else super().saved_names()

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> int:
        """`trained.safetensors`; after full fine-tuning it is a complete state dict, usable as model.weights."""
        return write_trained(folder, self.module, tensors, method=self._settings)
