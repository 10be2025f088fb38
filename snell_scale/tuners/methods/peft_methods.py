"""Methods that peft runs: LoRA and SHiRA from peft, dense kernelised LoRA, SNELL and SNELLA from this package."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snell_scale.interfaces import Engine, ModelBundle
from snell_scale.tuners.methods.base import MethodConfig, ModuleTuner, find_targets, matching_modules, seeded
from snell_scale.tuners.snell import SnellConfig
from snell_scale.tuners.snella import SnellaConfig, SnellaModel
from snell_scale.tuners.snella.competition import LastUpdate, own_gradient

Kernel = Literal["distance", "mixk", "linear", "sigmoid", "rbf", "exponential"]
TargetedPeftConfig = LoraConfig | ShiraConfig | SnellConfig

_PREFIX = "base_model.model."
_ADAPTER = "default"


class PeftMethodConfig(MethodConfig):
    """Base of the methods that wrap the model by `peft.get_peft_model`, its head in `modules_to_save`."""

    needs_rank: ClassVar[bool] = True

    def apply(self, bundle: ModelBundle, *, total_steps: int, steps_per_epoch: int, seed: int) -> "PeftTuner":
        targets = find_targets(bundle, self.targets)
        epochs = math.ceil(total_steps / steps_per_epoch)
        config = self.peft_config(bundle, targets, total_steps=total_steps, epochs=epochs, seed=seed)
        config.modules_to_save = list(bundle.head_modules) or None
        with seeded(seed):
            module = get_peft_model(cast(Any, bundle.module), config)
        assert isinstance(module, PeftModel)
        return self.tuner(module, bundle)

    @abstractmethod
    def peft_config(
        self, bundle: ModelBundle, targets: str | list[str], *, total_steps: int, epochs: int, seed: int
    ) -> TargetedPeftConfig:
        """peft's config of this method, without modules_to_save."""

    def tuner(self, module: PeftModel, bundle: ModelBundle) -> "PeftTuner":
        return PeftTuner(module, bundle, train_extra=self.train_extra)

    @property
    def rank(self) -> int:
        assert self.r is not None, "checked by the config"
        return self.r


class LoraMethodConfig(PeftMethodConfig):
    """LoRA, peft's own."""

    name: Literal["lora"] = "lora"
    lora_alpha: float | None = Field(default=None, gt=0, description="Scale × r; null: equal to r, a scale of 1.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="On the input of the adapter.")

    def peft_config(
        self, bundle: ModelBundle, targets: str | list[str], *, total_steps: int, epochs: int, seed: int
    ) -> LoraConfig:
        module, names = bundle.module, matching_modules(bundle.module, targets)
        attention = [n for n in names if isinstance(module.get_submodule(n), nn.MultiheadAttention)]
        if self.dropout and attention:
            raise ValueError(
                f"method.dropout is {self.dropout}, but method.targets includes {attention[0]}, an "
                "nn.MultiheadAttention: peft merges its LoRA before each product, where no dropout reaches it; "
                "set method.dropout=0, or method.targets to linear layers"
            )
        alpha = self.rank if self.lora_alpha is None else self.lora_alpha
        # peft declares an int and takes any number.
        return LoraConfig(
            r=self.rank, lora_alpha=cast(int, alpha), lora_dropout=self.dropout, target_modules=targets
        )


class ShiraMethodConfig(PeftMethodConfig):
    """SHiRA, peft's own: r·(m+n) randomly chosen entries of each (m, n) weight; linear layers only."""

    name: Literal["shira"] = "shira"

    def peft_config(
        self, bundle: ModelBundle, targets: str | list[str], *, total_steps: int, epochs: int, seed: int
    ) -> ShiraConfig:
        others = _not_linear(bundle, targets)
        if others:
            fit = [repr(name) for name, group in bundle.target_groups.items() if not _not_linear(bundle, group)]
            raise ValueError(
                f"method.targets includes {others[0]}, which is no linear layer: SHiRA adapts only these; set "
                f"method.targets to {' or '.join(fit) or 'names of linear layers'}"
            )
        # torch warns of unchecked sparse tensors unless told; peft's are made from indices that it checked.
        torch.sparse.check_sparse_tensor_invariants.disable()
        return ShiraConfig(r=self.rank, random_seed=seed, target_modules=targets)


def _not_linear(bundle: ModelBundle, targets: str | list[str]) -> list[str]:
    """Full names of the targets that are no linear layers."""
    names = matching_modules(bundle.module, targets)
    return [name for name in names if not isinstance(bundle.module.get_submodule(name), nn.Linear)]


class _KernelConfig(PeftMethodConfig):
    """What every method with kernelised factors can choose."""

    kernel: Kernel = Field(default="distance", description="K(A, B).")
    num_components: int = Field(default=2, gt=0, description="Distance components that share the rank.")
    scale: float | Literal["auto"] = Field(
        default=0.1,
        description="Coefficient of the distances (published: 0.1); 'auto' adapts it to width and rank.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="On the input of the delta (published: 0.1).")
    dropout_exclude_modules: tuple[str, ...] | None = Field(
        default=None, strict=False, description="Name endings of modules without that dropout (published: proj)."
    )
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="On the output of the delta (published: 0.1).")
    init_weights: Literal["random", "scaled", "zeros"] = Field(
        default="random",
        description="As published; or times init_scale; or zeros, which never train (for a study).",
    )
    init_scale: float = Field(default=1.0, gt=0)

    def kernel_settings(self, bundle: ModelBundle, targets: str | list[str]) -> dict[str, Any]:
        """The fields of a SnellConfig that are the same in all three methods."""
        excluded = self.dropout_exclude_modules
        return {
            "r": self.rank,
            "kernel": self.kernel,
            "num_components": self.num_components,
            "scale": self.scale,
            "dropout": self.dropout,
            "dropout_exclude_modules": list(excluded) if excluded else None,
            "drop_path": self.drop_path,
            "init_weights": self.init_weights,
            "init_scale": self.init_scale,
            "target_modules": targets,
            "fused_groups": dict(bundle.fused_groups),
        }


class KloraMethodConfig(_KernelConfig):
    """Kernelised LoRA, dense: SNELL's kernel of low-rank factors without the competition between entries."""

    name: Literal["klora"] = "klora"

    def peft_config(
        self, bundle: ModelBundle, targets: str | list[str], *, total_steps: int, epochs: int, seed: int
    ) -> SnellConfig:
        return SnellConfig(**self.kernel_settings(bundle, targets), sparsity=None)


class SnellMethodConfig(_KernelConfig):
    """SNELL: kernelised low-rank factors whose delta keeps only its largest entries."""

    name: Literal["snell"] = "snell"
    sparsity: float | None = Field(ge=0, lt=1, description="Share of entries set to zero; null: dense, as klora.")
    weighting: Literal["magnitude", "soft", "hard"] = Field(
        default="magnitude",
        description="Gradient-free factor of what is kept: |K| (as published), |K| - threshold, or 1.",
    )

    def peft_config(
        self, bundle: ModelBundle, targets: str | list[str], *, total_steps: int, epochs: int, seed: int
    ) -> SnellConfig:
        settings = self.kernel_settings(bundle, targets)
        return SnellConfig(**settings, sparsity=self.sparsity, weighting=self.weighting)


class SnellaMethodConfig(_KernelConfig):
    """SNELLA: SNELL whose matrices compete for one shrinking budget of non-zeros.

    target_sparsity=null is what was published as dense: its kernel without any competition.
    """

    name: Literal["snella"] = "snella"
    kernel: Kernel = Field(default="mixk", description="K(A, B).")
    weighting: Literal["magnitude", "soft", "hard"] = "magnitude"
    init_sparsity: float = Field(ge=0, lt=1, description="Share of zeros at the start (published: 0).")
    target_sparsity: float | None = Field(
        ge=0, lt=1, description="Share of zeros at the end, over all matrices; null: dense, nothing competes."
    )
    init_warmup: int = Field(default=0, ge=0, description="Ticks before the budget begins to shrink.")
    final_warmup: int = Field(default=0, ge=0, description="Last ticks, spent at target_sparsity.")
    mask_interval: int = Field(default=1, gt=0, description="Ticks between two allocations.")
    beta1: float = Field(default=0.85, ge=0, lt=1, description="Decay of the averaged importance.")
    beta2: float = Field(default=0.85, ge=0, lt=1, description="Decay of the averaged uncertainty.")
    tick: Literal["epoch", "step"] = Field(
        default="epoch", description="Unit of the schedule (published: epoch)."
    )

    def peft_config(
        self, bundle: ModelBundle, targets: str | list[str], *, total_steps: int, epochs: int, seed: int
    ) -> SnellConfig:
        if self.target_sparsity is None:
            return SnellConfig(**self.kernel_settings(bundle, targets), sparsity=None)
        return SnellaConfig(
            **self.kernel_settings(bundle, targets),
            weighting=self.weighting,
            init_sparsity=self.init_sparsity,
            target_sparsity=self.target_sparsity,
            init_warmup=self.init_warmup,
            final_warmup=self.final_warmup,
            mask_interval=self.mask_interval,
            beta1=self.beta1,
            beta2=self.beta2,
            tick=self.tick,
            total_ticks=epochs if self.tick == "epoch" else total_steps,
        )

    def tuner(self, module: PeftModel, bundle: ModelBundle) -> "PeftTuner":
        if self.target_sparsity is None:
            return PeftTuner(module, bundle, train_extra=self.train_extra)
        return SnellaTuner(module, bundle, train_extra=self.train_extra, tick=self.tick)


class PeftTuner(ModuleTuner):
    """Trains one peft adapter with the head, and the model's extra parameters if asked for."""

    def __init__(self, module: PeftModel, bundle: ModelBundle, *, train_extra: bool) -> None:
        self._peft = module
        self._extra = [_PREFIX + name for name in bundle.extra_trainable] if train_extra else []
        for name in self._extra:
            module.get_parameter(name).requires_grad_(True)
        super().__init__(module, no_decay=frozenset(_PREFIX + name for name in bundle.no_decay))

    def saved_names(self) -> list[str]:
        """What trains, and the adapter's buffers."""
        trained = [name for name, p in self._peft.named_parameters() if p.requires_grad]
        return trained + [
            name for name in self._peft.state_dict() if name not in dict(self._peft.named_parameters())
        ]

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> int:
        """adapter_config.json and adapter_model.safetensors, which `PeftModel.from_pretrained` reads.

        peft saves no single parameters of the base model; added to the file under their names in the PeftModel,
        it loads them with the rest.
        """
        self._peft.save_pretrained(str(folder), state_dict=dict(tensors))
        (folder / "README.md").unlink(missing_ok=True)  # peft's model card, a form to fill in
        weights = folder / "adapter_model.safetensors"
        if self._extra:
            extra = {name: tensors[name].contiguous() for name in self._extra}
            save_file(load_file(weights) | extra, weights, metadata={"format": "pt"})
        return sum(path.stat().st_size for path in (weights, folder / "adapter_config.json"))


class SnellaTuner(PeftTuner):
    """Gathers scores after every step and shares out the budget at every tick."""

    def __init__(
        self, module: PeftModel, bundle: ModelBundle, *, train_extra: bool, tick: Literal["epoch", "step"]
    ) -> None:
        super().__init__(module, bundle, train_extra=train_extra)
        model = module.base_model
        assert isinstance(model, SnellaModel)
        self._competition = model.competition()  # now, while every factor is whole
        self._last_update: LastUpdate = own_gradient
        self._tick = tick

    def begin_step(self, step: int, epoch: int, is_epoch_start: bool) -> dict[str, float]:
        """Figures at a tick that allocates: the competition's."""
        figures = super().begin_step(step, epoch, is_epoch_start)
        if self._tick == "epoch" and not is_epoch_start:
            return figures
        tick = epoch if self._tick == "epoch" else step
        allocation = self._competition.allocate(tick)
        return figures if allocation is None else figures | self._competition.figures(allocation, tick)

    def bind(self, engine: Engine) -> None:
        """Scores are taken from what the engine says of the last step, and kept laid out as the factors."""
        self._last_update = engine.last_update
        engine.keep_gradients([factor for pair in self._competition.factors().values() for factor in pair])
        self._competition.start(engine.place)

    def end_step(self) -> None:
        self._competition.update_scores(last_update=self._last_update)

    def tensors(self) -> list[Tensor]:
        return list(self._competition.state_dict().values())

    def sharded_state(self) -> dict[str, Tensor]:
        return self._competition.state_dict()
