"""What tests of the analysis start from: a way to write made-up runs, and a browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from synthetic_runs import WriteRun, write_synthetic_run


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes one run below tmp_path/<study>; see `write_synthetic_run`."""

    def write(method: str, seed: int, **figures: Any) -> Path:
        return write_synthetic_run(tmp_path, method, seed, **figures)

    return write
