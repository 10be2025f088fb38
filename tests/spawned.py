"""The ranks of a test, started together and ended with it."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import spawn

WORLD_SIZE = 2


def run_ranks(work: Callable[..., None], *arguments: Any, seconds: float, world_size: int = WORLD_SIZE) -> None:
    """`work(rank, *arguments)` in so many processes; raises what one of them raised, and leaves none behind."""
    context = spawn(work, args=arguments, nprocs=world_size, join=False)
    assert context is not None
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"the processes took more than {seconds} s"
    finally:
        for process in context.processes:
            if process is not None:
                process.kill()


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(number)]
    for bound in sockets:
        bound.bind(("127.0.0.1", 0))
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def set_rank(rank: int, world_size: int, port: int) -> None:
    """What a launcher tells a process of one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}})
