"""The processes of a run, as everything else sees them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


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
