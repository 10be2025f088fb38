"""The estimate for two ranks against what two processes measure, with every engine that shards or averages.

Also the test of ZeRO-3 at a size at which gathering the trained weights once crashed ("Cannot partition a
param in flight"): none of the tests would get to its end.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from snell_scale.config import Config, to_dict
from snell_scale.estimate.prediction import Estimator
from snell_scale.records import read_result, write_yaml
from tests.estimate.measured import CONFIGS, Pair, off_by, short

# FSDP2's own code runs on ranks that are not there, DDP's buckets are tensors; DeepSpeed's part is arithmetic.
ENGINES = {
    "ddp": (0.03, "engine.name=ddp"),
    "fsdp2": (0.03, "engine.name=fsdp2"),
    "zero1": (0.05, "engine.name=deepspeed", "engine.zero_stage=1"),
    "zero2": (0.05, "engine.name=deepspeed", "engine.zero_stage=2"),
    "zero3": (0.05, "engine.name=deepspeed", "engine.zero_stage=3"),
}
METHODS = ("snell", "full")
SIZE = (
    "data.image_size=32",
    "model.arguments={patch_size: 4, embed_dim: 384, depth: 6, num_heads: 6}",
    "engine.cpu_threads=1",
    "engine.timeout_seconds=600",
)
WORLD_SIZE = 2
CASES = [(engine, method) for engine in ENGINES for method in METHODS]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def _config(engine: str, method: str, folder: Path) -> Config:
    _, *settings = ENGINES[engine]
    name = f"name={engine}-{method}"
    return short(CONFIGS / "demo/transfer.yaml", folder, f"method.name={method}", name, *SIZE, *settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: two ranks, one run after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    files = []
    for engine, method in CASES:
        files.append(folder / f"{engine}-{method}.yaml")
        write_yaml(files[-1], to_dict(_config(engine, method, folder / "runs")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD_SIZE)]
    command += ["--module", "tests.engines.equality_worker", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "runs"


@pytest.mark.parametrize(("engine", "method"), CASES)
def test_the_peak_of_a_rank_is_what_is_measured(runs: Path, engine: str, method: str) -> None:
    result = read_result(runs / f"{engine}-{method}")
    assert (result.status, result.world_size) == ("ok", WORLD_SIZE)
    assert result.memory is not None
    with Estimator(_config(engine, method, runs), WORLD_SIZE, target="cpu") as estimator:
        predicted = estimator.predict()
    peak = off_by(Pair(predicted.memory, dict(result.memory)))["peak"]
    assert peak.share <= ENGINES[engine][0], f"{peak} is off by more than is promised"
    assert predicted.num_trainable_params == result.num_trainable_params
    assert predicted.num_total_params == result.num_total_params
    assert predicted.batch_size == result.batch_size
