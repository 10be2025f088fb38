"""The processes of a run: how they find each other, and what they tell each other from host to host.

Launchers (torchrun, deepspeed, SLURM) say through the environment which process this is. Votes and objects travel
over gloo, on the host, apart from the gradients; a failure is told through the store, which answers even while
every rank waits in a collective.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from snell_scale.interfaces import Failure

_FAILURE = "failure"


class Ranks:
    """See `interfaces.Ranks`. Ranks() is a process alone; it answers without any process group."""

    def __init__(
        self,
        *,
        rank: int = 0,
        local_rank: int = 0,
        world_size: int = 1,
        store: dist.Store | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """store: a connection of its own, for several threads use it.

        group: over gloo, for what hosts tell each other; None where this process is alone.
        """
        self.rank = rank
        self.local_rank = local_rank
        self.world_size = world_size
        self.group = group
        self._store = store
        self.before_end: Callable[[Failure], None] = lambda failure: None
        self.step = 0
        self.num_beats = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, function: Callable[[], Any]) -> Any:
        if self.group is None:
            return function()
        told: list[Any] = [None]
        if self.is_first:
            try:
                told = [(function(), None)]
            except (ValueError, OSError) as error:
                told = [(None, error)]
        dist.broadcast_object_list(told, src=0, group=self.group)
        value, error = told[0]
        if error is not None:
            raise error
        return value

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def start_maximum(self, value: int) -> Callable[[], int]:
        """The largest value of all ranks, when it is asked for: until then no rank waits for another."""
        if self.group is None:
            return lambda: value
        largest = torch.tensor([value])
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None

        def wait() -> int:
            work.wait()
            return int(largest.item())

        return wait

    def beat(self, step: int | None = None) -> None:
        """This rank makes progress (and is at this step): a job in which no rank does is ended."""
        self.step = self.step if step is None else step
        self.num_beats += 1

    def twin(self) -> "Ranks":
        """The same ranks with a group of their own, for another thread to talk over."""
        if self.group is None:
            return self
        timeout = timedelta(days=1)  # what watches over the ranks ends a job that hangs
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        return Ranks(
            rank=self.rank,
            local_rank=self.local_rank,
            world_size=self.world_size,
            store=self._store,
            group=group,
        )

    def tell_failure(self, failure: Failure) -> None:
        """Tell the other ranks why this one ends, unless another has told first. Never raises."""
        if self._store is None:
            return
        with suppress(RuntimeError):  # the store went with its host: the others notice that
            self._store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))

    def failure(self) -> Failure | None:
        """What a rank has told, or None; also None where the store is gone."""
        try:
            if self._store is None or not self._store.check([_FAILURE]):
                return None
            return Failure(**json.loads(self._store.get(_FAILURE)))
        except RuntimeError:
            return None

    def tell_report(self, report: str) -> bool:
        """Let the others know how this rank is, should one hang. False: the store is gone."""
        try:
            if self._store is not None:
                self._store.set(f"report/{self.rank}", report)
        except RuntimeError:
            return False
        return True

    def reports(self) -> dict[int, str]:
        """What each rank last said of itself; ranks that said nothing are left out."""
        found: dict[int, str] = {}
        try:
            for rank in range(self.world_size):
                if self._store is not None and self._store.check([f"report/{rank}"]):
                    found[rank] = self._store.get(f"report/{rank}").decode()
        except RuntimeError:
            pass
        return found


def launched_world_size() -> int:
    """How many processes the launcher started; 1 where there was no launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
