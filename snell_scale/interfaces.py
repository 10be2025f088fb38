"""The types that models, tasks, data, tuners and engines meet in; no behaviour lives here."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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

    def select(self, losses: Iterator[Tensor], sum_over_ranks: Callable[[list[Tensor]], None]) -> None:
        """Choose what to train from the gradients of all ranks' losses; frees every gradient it made.

        sum_over_ranks: replaces each tensor by its sum over the ranks, in place.
        """
        ...

    def bind(self, engine: "Engine") -> None:
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


@dataclass(frozen=True)
class Failure:
    """Why the job ends: what the rank that failed first told the others."""

    rank: int
    status: str
    message: str
    exit_code: int


class Ranks(Protocol):
    """The processes of a run, and what they tell each other from host to host.

    Every rank makes the same calls in the same order; each waits for the others.
    """

    rank: int
    local_rank: int
    world_size: int
    group: Any
    """A process group over gloo, apart from the gradients'; None for a process alone."""

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes records and speaks to the user."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (picklable), in rank order, on every rank."""
        ...

    def first(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on rank 0, which alone calls it; its ValueError or OSError is raised on all."""
        ...

    def barrier(self) -> None: ...

    def start_maximum(self, value: int) -> Callable[[], int]:
        """The largest value of all ranks, when it is asked for: until then no rank waits for another."""
        ...

    def twin(self) -> "Ranks":
        """The same ranks with a group of their own, for another thread to talk over."""
        ...

    def tell_failure(self, failure: Failure) -> None:
        """Tell the other ranks why this one ends, unless another has told first. Never raises."""
        ...

    def failure(self) -> Failure | None:
        """What a rank has told, or None."""
        ...

    before_end: Callable[[Failure], None]
    """Called on rank 0, from another thread, before a process that does not come out of a collective is ended."""

    def beat(self, step: int | None = None) -> None:
        """This rank makes progress (and is at this step): a job in which no rank does is ended."""
        ...


ShardWriter: TypeAlias = Callable[[Path, Ranks], list[Path]]
"""Writes this rank's files into a folder and returns them; every rank calls it at the same time."""


@dataclass(frozen=True)
class StepPlan:
    """What an engine has to know of a step before the first one.

    microbatch_size: samples of one forward on one rank.
    """

    microbatch_size: int
    gradient_accumulation: int
    clip_grad_norm: float | None


class Engine(Protocol):
    """Owns placement, sharding, precision, backward, reduction, clipping, the optimizer's step, and state.

    Tensors "as the engine keeps them" are whole, or this rank's shard (a DTensor, or what DeepSpeed makes of it).
    """

    device: Any

    @property
    def ranks(self) -> Ranks: ...

    @property
    def norm_names(self) -> tuple[str, ...]:
        """What the entries of `step`'s norms belong to: the optimizer's named groups, or ("all",)."""
        ...

    def setup(
        self,
        module: nn.Module,
        make_optimizer: Callable[[nn.Module], Optimizer],
        *,
        blocks: Sequence[nn.Module],
        plan: StepPlan,
    ) -> nn.Module:
        """Place and shard the module, THEN make the optimizer; returns what a training step calls.

        blocks: the model's repeated modules, in order: units of sharding. `module` keeps its parameters' names.
        """
        ...

    @property
    def optimizer(self) -> Optimizer: ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def microbatch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one microbatch; gradients travel with the last of a step only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """loss: already divided by the number of microbatches."""
        ...

    @property
    def skips_steps(self) -> bool:
        """Whether a non-finite gradient is an expected event (loss scaling) rather than divergence."""
        ...

    def step(self) -> Tensor:
        """Unscale, clip, step; returns the gradient norms before clipping, one of `norm_names` each, unsynced.

        They are norms of the whole gradients, equal on every rank.
        """
        ...

    def zero_grad(self) -> None: ...

    def edit_gradient(self, parameter: nn.Parameter, edit: Callable[[Tensor], None]) -> None:
        """From now on let `edit` change each gradient of the parameter in place, before it is clipped.

        The gradient is laid out as `place` would have it.
        """
        ...

    def keep_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Before training: of these, `last_update` will be asked."""
        ...

    def last_update(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor | None]:
        """(value, the reduced and clipped gradient that the last step used), both laid out alike.

        Between `step` and `zero_grad`; whole, or both as this engine shards the parameter.
        """
        ...

    def place(self, whole: Tensor, like: nn.Parameter) -> Tensor:
        """The part of a whole tensor that belongs where `like` (a parameter of this shape) is kept."""
        ...

    def gather(self, names: Collection[str]) -> dict[str, Tensor]:
        """Whole parameters and buffers of the module, copied to the CPU of rank 0; {} on other ranks."""
        ...

    def scatter(self, tensors: Mapping[str, Tensor]) -> None:
        """Put whole tensors that rank 0 holds into the module's parameters and buffers of these names.

        For a model that is to be used, not trained on: the optimizer's own copies are left as they are.
        """
        ...

    def mean(self, loss: Tensor) -> Tensor:
        """The mean of a 0-d tensor over the ranks, without a host sync."""
        ...

    def sum(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor's sum over the ranks; every rank has the same keys."""
        ...

    def sum_in_place(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its sum over the ranks."""
        ...

    def move(self, batch: Batch) -> Batch: ...

    def describe(self) -> str:
        """For the record: "ddp", "deepspeed zero-2", …"""
        ...

    def check_checkpoint(self, layout: Mapping[str, Any]) -> None:
        """ValueError, saying what to do, where a checkpoint of this layout cannot be read by this engine."""
        ...

    def layout(self) -> dict[str, Any]:
        """What the manifest says of this engine's checkpoints; `check_checkpoint` of another run reads it."""
        ...

    def writer(self, extra: Mapping[str, Tensor], *, staged: bool) -> "ShardWriter":
        """A function that writes this rank's part of the trained weights, optimizer state and `extra`.

        staged: it works on copies made now, so that training may go on while another thread calls it.
        """
        ...

    def load(self, folder: Path, extra: Mapping[str, Tensor]) -> None:
        """Read what `writer` wrote into the module, the optimizer and the tensors of `extra`, in place."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain state that is the same on every rank (the loss scale)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
