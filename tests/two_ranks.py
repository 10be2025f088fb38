"""Both ranks of a test, started together and ended with it."""

import socket
import time
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import spawn

WORLD_SIZE = 2


def run_two_ranks(work: Callable[..., None], *arguments: Any, seconds: float) -> None:
    """`work(rank, *arguments)` in two processes; raises what one of them raised, and leaves none behind."""
    context = spawn(work, args=arguments, nprocs=WORLD_SIZE, join=False)
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
