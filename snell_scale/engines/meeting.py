"""How the processes of one attempt at a run find each other, also in the store of an earlier attempt."""

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

_POLL_SECONDS = 0.02


def meet(timeout_seconds: float) -> tuple[dist.Store, int, int]:
    """(a store of this attempt's own, rank, world size), from the variables that launchers set.

    ValueError where not all ranks come in time.
    """
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        store = dist.PrefixStore("snell_scale", store)
        attempt = name_attempt(store, rank, world_size=world_size, timeout_seconds=timeout_seconds)
    except (dist.DistError, TimeoutError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]  # torch adds its own stack
        raise ValueError(
            f"rank {os.environ['RANK']} did not meet the others within {timeout_seconds:g} s "
            f"(engine.timeout_seconds) at {where} (MASTER_ADDR, MASTER_PORT): {reason}. Start all "
            f"{os.environ['WORLD_SIZE']} processes (WORLD_SIZE), with an address that they all reach"
        ) from error
    return dist.PrefixStore(attempt, store), rank, world_size


def name_attempt(store: dist.Store, rank: int, *, world_size: int, timeout_seconds: float) -> str:
    """A name for this attempt, the same on all ranks, that no earlier one had.

    torchrun's store outlives an attempt, with the addresses and failures that its ranks left there, and its count
    of restarts is not the same on every node. So every process has a token that no other ever had, and rank 0's
    is the name: all who ask are told, again and again, for who asked first may be of an earlier attempt.
    """
    deadline = time.monotonic() + timeout_seconds
    return _invite(store, world_size, deadline) if rank == 0 else _ask(store, rank, deadline)


def _invite(store: dist.Store, world_size: int, deadline: float) -> str:
    attempt = uuid4().hex
    missing = set(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"asks/{rank}"]):
                token = store.get(f"asks/{rank}").decode()
                store.set(f"answer/{token}", attempt)
        missing = {rank for rank in missing if not store.check([f"{attempt}/{rank}"])}
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"rank(s) {', '.join(map(str, sorted(missing)))} did not come")
        time.sleep(_POLL_SECONDS)
    return attempt


def _ask(store: dist.Store, rank: int, deadline: float) -> str:
    token = uuid4().hex
    store.set(f"asks/{rank}", token)
    store.wait([f"answer/{token}"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
    attempt = store.get(f"answer/{token}").decode()
    store.set(f"{attempt}/{rank}", "here")
    return attempt
