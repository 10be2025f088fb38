"""What the tests of the cluster stage share: a run without interruptions, and a SLURM cluster."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.launched import LaunchedRun
from tests.cluster.slurm import Cluster, cluster, missing_programs


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[LaunchedRun]:
    """A run of this test's own; none of its processes outlives the test."""
    run = LaunchedRun(tmp_path)
    yield run
    run.kill_all()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LaunchedRun:
    """The run on two processes that nothing interrupted: what every other one must arrive at."""
    run = LaunchedRun(tmp_path_factory.mktemp("whole"))
    launcher = run.start("torchrun.sh", "--nproc-per-node", "2")
    assert launcher.wait(timeout=300) == 0, (run.root / "log").read_text()
    return run


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, n1 and n2, on this machine."""
    missing = missing_programs()
    assert not missing, f"{', '.join(missing)} missing: `make test-cluster` installs slurm-wlm and munge"
    assert os.geteuid() == 0, "a SLURM cluster of one's own is started as root"
    with cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started
