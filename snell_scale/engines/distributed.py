"""Engines of several processes: how they join, and how they part."""

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from snell_scale.engines.meeting import meet
from snell_scale.engines.ranks import Ranks, launched_world_size
from snell_scale.engines.torch_engine import EngineConfig
from snell_scale.engines.watchdog import watched

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
# How much longer than the watchdog a collective waits: the watchdog knows who hangs, and says so first.
_PATIENCE_SECONDS = 30.0
_FROM_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class DistributedConfig(EngineConfig):
    """Settings of an engine that runs on as many processes as the launcher starts, or on one."""

    def check(self) -> None:
        super().check()
        if self.device.startswith("cuda:"):
            raise ValueError(
                f"engine.device is {self.device!r}, but with engine.name={self.name} every rank takes the GPU of "
                "its number; set it to cuda, and choose the GPUs with CUDA_VISIBLE_DEVICES"
            )
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.device != "cpu" and torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"the launcher started {local_rank + 1} or more processes on this machine, which shows "
                f"{torch.cuda.device_count()} GPU(s); start one for each GPU, or set engine.device=cpu"
            )

    @contextmanager
    def join(self) -> Iterator[Ranks]:
        """The processes of this run, while the block runs. No device is touched."""
        uses_cuda = self.device != "cpu" and torch.cuda.is_available()
        backend = _BACKENDS["cuda" if uses_cuda else "cpu"]
        with _environment_of_one():
            store, rank, world_size = meet(self.timeout_seconds)
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            ranks = Ranks(rank=rank, local_rank=local_rank, world_size=world_size, store=_copy(store))
            with watched(ranks, timeout_seconds=self.timeout_seconds) as stop_talking:
                timeout = timedelta(seconds=self.timeout_seconds + _PATIENCE_SECONDS)
                dist.init_process_group(
                    backend,
                    store=dist.PrefixStore("group", store),
                    rank=rank,
                    world_size=world_size,
                    timeout=timeout,
                )
                try:
                    group = dist.new_group(backend="gloo", timeout=timeout)
                    assert isinstance(group, dist.ProcessGroup)
                    ranks.group = group
                    yield ranks
                    if ranks.failure() is None:
                        stop_talking()
                        ranks.barrier()
                finally:
                    # gloo's threads abort a process whose collectives' tensors outlive the group.
                    gc.collect()
                    dist.destroy_process_group()


def _copy(store: Any) -> dist.Store:
    """Another connection to it. torch's own stubs do not know `Store.clone` yet."""
    return store.clone()


@contextmanager
def _environment_of_one() -> Iterator[None]:
    """Without a launcher: the variables that make this process a group of one."""
    given = [name for name in _FROM_LAUNCHER if name in os.environ]
    if "RANK" in given or launched_world_size() > 1:
        missing = [name for name in _FROM_LAUNCHER if name not in given]
        if missing:
            raise ValueError(
                f"the environment has {', '.join(given)}, but not {', '.join(missing)}: start through a launcher "
                "(launch/README.md), which sets all of them, or unset them for one process"
            )
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
