"""`--fit` under torchrun: rank 0 estimates, and the estimate's ranks that are not there leave nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snell_scale.records import read_result

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_run_of_two_ranks_is_fitted(tiny_file: Path, engine: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launch += [
        "--rdzv-endpoint=127.0.0.1:0",
        "-m",
        "snell_scale.cli",
        "run",
        str(tiny_file),
        f"engine.name={engine}",
    ]
    # Less than the whole batch needs, with the headroom.
    fit = ["evaluation.batch_size=2", "training.batch_size=16", "--fit", "--device-memory", "500KiB", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *fit], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fit: " in done.stdout
    result = read_result(tiny_file.parent / "runs" / "tiny")
    assert (result.status, result.world_size, result.batch_size) == ("ok", 2, 16)
    assert result.conditions["gradient_accumulation"] > 1
