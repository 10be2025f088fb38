"""What the tests of sweeps share."""

import signal
from collections.abc import Iterator

import pytest

from tests.command_line import call
from tests.sweep.planned import Call


@pytest.fixture
def snell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return lambda *arguments: call(monkeypatch, capsys, *map(str, arguments))


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
