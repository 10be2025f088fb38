"""What an engine is to the loop, to tuners and to checkpoints."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from snell_scale.interfaces.data import Batch
from snell_scale.interfaces.ranks import Ranks

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

    def held(self) -> Mapping[str, Sequence[Tensor]]:
        """What this rank keeps between steps beside parameters, their .grad and the optimizer's state.

        By memory category ("parameters", "gradients", "optimizer"), for who measures.
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

    def writer(self, extra: Mapping[str, Tensor], *, staged: bool) -> ShardWriter:
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
