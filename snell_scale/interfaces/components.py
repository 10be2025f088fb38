"""Models, tasks and tuners: what a config chooses by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

from torch import Tensor, nn
from torch.utils.data import Dataset

from snell_scale.interfaces.data import Batch, DataBundle, InputSpec
from snell_scale.interfaces.engine import Engine

ModelOutput: TypeAlias = Literal["class_logits", "pixel_logits", "image_text_features", "denoised"]
"""What a model's forward gives, which a task checks:

class_logits: model(image) → (B, classes)
pixel_logits: model(image) → (B, classes, H, W), H and W those of the image
image_text_features: model(image, text) → (image features | None, text features | None, 0-d logit scale), features
  (B, D) of length 1; image or text may be None
denoised: `bundle.diffusion.denoise(model, …)` → (B, C, h, w): noise, velocity or flow, as the scheduler's config
  says
"""


class Encoders(Protocol):
    """The frozen models that a diffusion model stands behind; loaded when first called, used before training."""

    @property
    def fingerprint(self) -> str:
        """Changes when the encoders do: a cache of what they gave is theirs alone."""
        ...

    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] → "mean" and "std", (B, C, h, w), of the latents, scaled for the model."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of each prompt: entries of (B, …), as the model's forward takes them."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) → images (B, 3, H, W) in [-1, 1]."""
        ...

    def to(self, device: Any) -> None: ...

    def release(self) -> None:
        """Free them; the next call loads them again."""
        ...


@dataclass(frozen=True)
class Diffusion:
    """What a denoising model brings with it.

    scheduler: diffusers' config of the noise schedule. latent_shape: (C, h, w) of what the model denoises.
    denoise: (model, noisy latents (B, C, h, w), timesteps (B,), condition) → (B, C, h, w); the condition is what
    `encoders.encode_prompts` gave for the B samples. Architectures differ in what they call these arguments.
    condition_shapes: what `encode_prompts` gives, without the B; known without the encoders.
    """

    scheduler: Mapping[str, Any]
    encoders: Encoders
    latent_shape: tuple[int, int, int]
    denoise: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    condition_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelBundle:
    """A model and what a tuner or an engine must know of it, as data.

    wrap_points: names of the repeated blocks (sharding units, activation checkpointing).
    target_groups: group name → regular expression of full module names to adapt ("all", "attention", …).
    fused_groups: module-name suffix → number of matrices stacked along its output ("qkv" → 3).
    head_modules: modules trained and saved whole by every method. extra_trainable: further parameters
    that the published recipes train beside the adapter (cls_token). diffusion: of a model that denoises.
    tokenize: of a model that reads text: N captions → (N, length) int64.
    """

    module: nn.Module
    wrap_points: tuple[str, ...]
    target_groups: Mapping[str, str]
    fused_groups: Mapping[str, int]
    head_modules: tuple[str, ...]
    input_spec: InputSpec
    extra_trainable: tuple[str, ...] = ()
    no_decay: frozenset[str] = frozenset()
    output: ModelOutput = "class_logits"
    diffusion: Diffusion | None = None
    tokenize: Callable[[Sequence[str]], Tensor] | None = None


class StepOutput(TypedDict):
    """What a task returns for one batch: the 0-d loss that is trained, and the model's outputs."""

    loss: Tensor
    outputs: Tensor


class Evaluation(Protocol):
    """One pass over a split: takes in batches, then gives metrics from sums that add up across ranks."""

    def add(self, model: nn.Module, batch: Batch, *, counts: bool = True) -> None:
        """Every rank calls it equally often, and inside it the model; counts=False: only for that."""
        ...

    def sums(self) -> dict[str, Tensor]:
        """What this rank has seen, float64 or int64, with the same keys and shapes on every rank."""
        ...

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of the whole split from the sums of all ranks."""
        ...


class Task(Protocol):
    """Turns (model, batch) into a loss, and splits into metrics and pictures."""

    metric: str
    """The metric that chooses the best step; `snell_scale.metrics` says which way is better."""

    reported: tuple[str, ...]
    """The metrics of the test split that tables show, the most telling first."""

    def prepare(self, data: DataBundle, engine: Engine) -> DataBundle:
        """Once, on every rank, before the first batch: compute what is computed once. Returns the data to use."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput: ...

    def evaluation(self, model: nn.Module, split: Dataset[Batch]) -> Evaluation:
        """A fresh pass over `split`; every rank calls it, with the model in evaluation mode."""
        ...

    def test_metrics(self, model: nn.Module, data: DataBundle) -> dict[str, float]:
        """After training, on every rank: test metrics that no pass over the split gives (of samples)."""
        ...

    def describe_metrics(self) -> dict[str, str]:
        """Metric → what made its value, where the name does not say it (the feature backend of a FID)."""
        ...

    def pictures(self, model: nn.Module, split: Dataset[Batch]) -> dict[str, Tensor]:
        """Name → (H, W, 3) uint8 on the CPU: what the model makes of some samples; every rank calls it."""
        ...


class Tuner(Protocol):
    """A fine-tuning method applied to a model: what trains, what happens between steps, what is saved."""

    module: nn.Module
    """What the engine runs and trains."""

    no_decay: frozenset[str]
    """Parameter names of `module` exempt from weight decay, beside biases and norms."""

    needs_selection: bool
    """Whether `select` must see the training gradients before the optimizer exists (GPS)."""

    def num_trainable(self) -> int:
        """Numbers that training can change (for a masked method: the unmasked ones)."""
        ...

    def select_by_shape(self) -> None:
        """In place of `select` where tensors have no values: as many entries as it would choose, any of them."""
        ...

    def select(self, losses: Iterator[Tensor], sum_over_ranks: Callable[[list[Tensor]], None]) -> None:
        """Choose what to train from the gradients of all ranks' losses; frees every gradient it made.

        sum_over_ranks: replaces each tensor by its sum over the ranks, in place.
        """
        ...

    def bind(self, engine: Engine) -> None:
        """Called once, after engine.setup: the parameters are now where, and as, the engine keeps them."""
        ...

    def begin_step(self, step: int, epoch: int, is_epoch_start: bool) -> dict[str, float]:
        """Called before step's forward; returns figures for the step's log line (may be empty)."""
        ...

    def end_step(self) -> None:
        """Called after the optimizer stepped, while `engine.last_update` still answers."""
        ...

    def tensors(self) -> list[Tensor]:
        """What the method keeps beside parameters (masks, scores): counted as optimizer state."""
        ...

    def saved_names(self) -> list[str]:
        """Names of the parameters and buffers of `module` that `save` wants whole."""
        ...

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> int:
        """Write the trained part, `tensors` by the names of `saved_names`, for PEFT (or as safetensors).

        On rank 0 only. Returns the bytes written.
        """
        ...

    def sharded_state(self) -> dict[str, Tensor]:
        """State shaped and laid out as parameters are, live: a checkpoint is read into these very tensors."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State that is the same on every rank: plain values and whole tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
