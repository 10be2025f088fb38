"""What every test of the analysis starts from: a way to write made-up runs."""

from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import WriteRun, write_synthetic_run


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes one run below tmp_path/<study>; see `write_synthetic_run`."""

    def write(method: str, seed: int, **figures: Any) -> Path:
        return write_synthetic_run(tmp_path, method, seed, **figures)

    return write
