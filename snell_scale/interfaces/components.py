"""Models, tasks and tuners: what a config chooses by name."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from torch import Tensor, nn

from snell_scale.interfaces.data import Batch, InputSpec
from snell_scale.interfaces.engine import Engine


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
