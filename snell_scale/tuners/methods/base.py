"""What fine-tuning methods share: the common fields of their configs, targets, freezing, a plain tuner."""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snell_scale.config import StrictModel
from snell_scale.interfaces import Engine, ModelBundle, Tuner
from snell_scale.tuners.methods.trained_file import trained_names


class MethodConfig(StrictModel, ABC):
    """Settings that every method accepts, so that changing `method.name` alone changes the method.

    A method without a rank or without targets ignores `r` or `targets`.
    """

    needs_rank: ClassVar[bool] = False

    r: int | None = Field(default=None, gt=0, description="Rank; ignored by methods without one.")
    targets: str | tuple[str, ...] = Field(
        default="all",
        description="What to adapt: a group of the model ('all', 'attention', 'mlp', …), a regular expression of "
        "full module names, or a list of module names or their endings.",
    )
    train_extra: bool = Field(default=False, description="Also train the model's extra parameters (cls_token).")

    @model_validator(mode="after")
    def _check_rank(self) -> "MethodConfig":
        if self.needs_rank and self.r is None:
            raise ValueError("this method has a rank: set method.r")
        return self

    @abstractmethod
    def apply(self, bundle: ModelBundle, *, total_steps: int, steps_per_epoch: int, seed: int) -> Tuner:
        """Change the bundle's module in place and say what trains. New parameters are a function of `seed`."""


class ModuleTuner(ABC):
    """A tuner that needs nothing between steps and keeps no state; see `interfaces.Tuner`.

    Batch norms whose parameters are all frozen run on their stored statistics: these belong to the frozen
    model, and no adapter file would hold the changed ones.
    """

    needs_selection = False

    def __init__(self, module: nn.Module, *, no_decay: frozenset[str]) -> None:
        self.module = module
        self.no_decay = no_decay
        self._frozen_norms = [
            child
            for child in module.modules()
            if isinstance(child, _BatchNorm) and not any(p.requires_grad for p in child.parameters())
        ]

    def num_trainable(self) -> int:
        """Entries that training can change."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    def select(self, losses: Iterator[Tensor], sum_over_ranks: Callable[[list[Tensor]], None]) -> None:
        raise AssertionError(f"{type(self).__name__} selects nothing")

    def select_by_shape(self) -> None:
        raise AssertionError(f"{type(self).__name__} selects nothing")

    def bind(self, engine: Engine) -> None:
        return None

    def begin_step(self, step: int, epoch: int, is_epoch_start: bool) -> dict[str, float]:
        self.hold_statistics()
        return {}

    def end_step(self) -> None:
        return None

    def tensors(self) -> list[Tensor]:
        return []

    def saved_names(self) -> list[str]:
        """What trains, and the buffers of the modules that own some of it."""
        return trained_names(self.module)

    @abstractmethod
    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> int: ...

    def hold_statistics(self) -> None:
        """Before every forward in training mode, for `module.train()` has reset it."""
        for norm in self._frozen_norms:
            norm.eval()

    def sharded_state(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"the checkpoint has a tuner state {sorted(state)}, but this method keeps none")


def train_only(module: nn.Module, names: Collection[str]) -> None:
    """Set requires_grad to exactly the parameters of these names."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)


def parameters_below(module: nn.Module, prefixes: Sequence[str]) -> set[str]:
    """Full names of the parameters that are one of `prefixes` or lie below one."""
    below = tuple(f"{prefix}." for prefix in prefixes)
    return {name for name, _ in module.named_parameters() if name in prefixes or name.startswith(below)}


def always_trained(bundle: ModelBundle, *, train_extra: bool) -> set[str]:
    """Names of the parameters that every method trains: the head and, if asked for, the extra ones."""
    extra = bundle.extra_trainable if train_extra else ()
    return parameters_below(bundle.module, (*bundle.head_modules, *extra))


def find_targets(bundle: ModelBundle, targets: str | Sequence[str]) -> str | list[str]:
    """`target_modules` for PEFT: a regular expression of full names, or a list of names and endings.

    ValueError where nothing matches, a list's entry matches nothing, or the head is meant.
    """
    module = bundle.module
    chosen = bundle.target_groups.get(targets, targets) if isinstance(targets, str) else list(targets)
    try:
        matched = matching_modules(module, chosen)
    except re.error as error:
        raise ValueError(f"method.targets is {chosen!r}, no regular expression: {error}") from None
    entries = {chosen: chosen} if isinstance(chosen, str) else {entry: [entry] for entry in chosen}
    missing = [entry for entry, target in entries.items() if not matching_modules(module, target)]
    heads = [name for name in matched for head in bundle.head_modules if f"{name}.".startswith(f"{head}.")]
    if missing or heads or not matched:
        problem = f"{', '.join(heads)} belongs to the head, which is trained whole" if heads else ""
        problem = problem or f"{', '.join(missing) or 'an empty list'} matches nothing"
        linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)][:3]
        raise ValueError(
            f"method.targets: {problem}. Groups of this model: {', '.join(bundle.target_groups)}; full module "
            f"names look like {', '.join(linear)}"
        )
    return chosen


def matching_modules(module: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names that peft would match: a string is a regular expression, a list holds names or their endings."""
    names = [name for name, _ in module.named_modules() if name]
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if any(name == end or name.endswith(f".{end}") for end in targets)]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers that depend on `seed` alone, without moving the caller's CPU stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
