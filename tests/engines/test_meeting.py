"""The ranks of an attempt agree on a name of their own, whatever earlier attempts left in the store."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from snell_scale.engines.ddp import DdpConfig
from snell_scale.engines.meeting import meet, name_attempt

_WORLD_SIZE = 3
_SECONDS = 20.0  # all of it takes a tenth of a second

Connect = Callable[[], dist.Store]


@pytest.fixture
def connect() -> Connect:
    """Connections to one store, one for each thread."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def client() -> dist.Store:
        timeout = timedelta(seconds=_SECONDS)
        return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)

    return client


def _names(connect: Connect, ranks: list[int]) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(
            pool.map(
                lambda rank: name_attempt(connect(), rank, world_size=_WORLD_SIZE, timeout_seconds=_SECONDS),
                ranks,
            )
        )


def test_every_attempt_has_another_name(connect: Connect) -> None:
    names = [_names(connect, [0, 1, 2]) for _ in range(3)]
    assert all(len(set(attempt)) == 1 for attempt in names)
    assert len({attempt[0] for attempt in names}) == 3


def test_a_rank_that_asked_and_was_killed_is_not_taken_for_the_next(connect: Connect) -> None:
    store = connect()
    _names(connect, [0, 1, 2])
    store.set("asks/1", "the token of a process that is gone")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(name_attempt, connect(), 0, world_size=_WORLD_SIZE, timeout_seconds=_SECONDS)
        store.wait(["answer/the token of a process that is gone"], timedelta(seconds=_SECONDS))
        assert not first.done()
        others = [
            pool.submit(name_attempt, connect(), rank, world_size=_WORLD_SIZE, timeout_seconds=_SECONDS)
            for rank in (1, 2)
        ]
        assert {first.result(), others[0].result()} == {others[1].result()}


def test_ranks_that_do_not_come_are_named(connect: Connect) -> None:
    with pytest.raises(TimeoutError, match=r"rank\(s\) 1, 2 did not come"):
        name_attempt(connect(), 0, world_size=_WORLD_SIZE, timeout_seconds=0.2)


def test_the_message_names_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"rank 1 .*engine\.timeout_seconds.* at 127\.0\.0\.1:9 .*Start all 2"):
        meet(1.0)


def test_half_of_a_launchers_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = r"has WORLD_SIZE, but not RANK, MASTER_ADDR, MASTER_PORT: start"
    with pytest.raises(ValueError, match=expected), DdpConfig(device="cpu").join():
        pytest.fail("joined")


def test_more_processes_than_gpus_and_one_gpu_for_all_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    DdpConfig(device="auto").check()
    with pytest.raises(ValueError, match=r"'cuda:1', but with engine.name=ddp .* CUDA_VISIBLE_DEVICES"):
        DdpConfig(device="cuda:1").check()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"started 3 or more processes .* shows 2 GPU"):
        DdpConfig(device="auto").check()
    DdpConfig(device="cpu").check()
