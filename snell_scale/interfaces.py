"""The types that models, tasks, data, tuners and engines meet in; no behaviour lives here."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict

from torch import Tensor, nn
from torch.optim import Optimizer
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
class ModelBundle:
    """A model and what a tuner or an engine must know of it, as data.

    wrap_points: names of the repeated blocks (sharding units, activation checkpointing).
    target_groups: group name → regular expression of full module names to adapt ("all", "attention", …).
    fused_groups: module-name suffix → number of matrices stacked along its output ("qkv" → 3).
    head_modules: modules trained and saved whole by every method. extra_trainable: further parameters
    that the published recipes train beside the adapter (cls_token).
    """

    module: nn.Module
    wrap_points: tuple[str, ...]
    target_groups: Mapping[str, str]
    fused_groups: Mapping[str, int]
    head_modules: tuple[str, ...]
    input_spec: InputSpec
    extra_trainable: tuple[str, ...] = ()
    no_decay: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DataBundle:
    """Three disjoint splits, indexed by `SampleKey`: train fits, validation chooses, test reports, once."""

    train: Dataset[Batch]
    validation: Dataset[Batch]
    test: Dataset[Batch]
    class_names: tuple[str, ...]
    input_spec: InputSpec
    sizes: Mapping[str, int] = field(default_factory=dict)


class StepOutput(TypedDict):
    """What a task returns for one batch: the 0-d loss that is trained, and the model's outputs."""

    loss: Tensor
    outputs: Tensor


class Task(Protocol):
    """Turns (model, batch) into a loss, and batches into metrics through sums that add up across ranks."""

    metric: str
    """The metric that chooses the best step; higher is better."""

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput: ...

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Additive statistics of one evaluation batch (float64 or int64 tensors)."""
        ...

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of a whole split from the summed statistics."""
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

    def select(self, losses: Iterator[Tensor]) -> None:
        """Choose what to train from the gradients of these losses; frees every gradient it made."""
        ...

    def begin_step(self, step: int, epoch: int, is_epoch_start: bool) -> dict[str, float]:
        """Called before step's forward; returns figures for the step's log line (may be empty)."""
        ...

    def end_step(self) -> None:
        """Called after the optimizer stepped, while the gradients just used still stand."""
        ...

    def tensors(self) -> list[Tensor]:
        """What the method keeps beside parameters (masks, scores): counted as optimizer state."""
        ...

    def save(self, folder: Path) -> int:
        """Write the trained part for PEFT (or as safetensors) to `folder`; returns its bytes."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Engine(Protocol):
    """Owns placement, precision, backward, clipping, the optimizer's step and cross-rank sums."""

    device: Any
    rank: int
    world_size: int

    def setup(self, module: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> nn.Module:
        """Place (and shard) the module, THEN make the optimizer; returns the module to call."""
        ...

    @property
    def optimizer(self) -> Optimizer: ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def backward(self, loss: Tensor) -> None: ...

    @property
    def skips_steps(self) -> bool:
        """Whether a non-finite gradient is an expected event (loss scaling) rather than divergence."""
        ...

    def step(self, *, clip_grad_norm: float | None) -> Tensor:
        """Unscale, clip, step; returns the gradient norm of each parameter group before clipping, unsynced."""
        ...

    def zero_grad(self) -> None: ...

    def sum(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def move(self, batch: Batch) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
