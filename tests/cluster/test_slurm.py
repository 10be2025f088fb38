"""launch/slurm.sbatch and `snell-scale sweep` on a real SLURM cluster of two nodes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snell_scale.records import read_result
from tests.cluster.launched import LAUNCH, STEPS, LaunchedRun, environment_of
from tests.cluster.slurm import Cluster
from tests.cluster.waiting import wait_for

# Up to three starts of a run and two decisions of SLURM's, each with a limit of its own.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def slurm(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster of the session; a job that a failed test left behind does not outlive the test."""
    yield slurm
    slurm.call("scancel", "--user=root", "--full", "--signal=KILL")
    slurm.call("scancel", "--user=root")


def submit(slurm: Cluster, run: LaunchedRun, *options: str) -> str:
    """The number of the job that runs `run` on two nodes."""
    script = (LAUNCH / "slurm.sbatch", run.config, *run.settings)
    where = ("--nodes=2", f"--output={run.root}/job.log", "--export=ALL,NPROC_PER_NODE=1")
    return slurm.call("sbatch", "--parsable", *where, *options, *script, cwd=LAUNCH.parent).strip()


def wait_for_end(slurm: Cluster, job: str, run: LaunchedRun, *, seconds: float = 300) -> dict[str, str]:
    def ended() -> bool:
        return slurm.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    try:
        wait_for(ended, seconds=seconds, what=f"end of job {job}, {slurm.job(job)['JobState']}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(run.root / 'job.log').read_text()}") from None
    return slurm.job(job)


def test_a_warned_job_is_requeued_and_continues(
    slurm: Cluster, launched: LaunchedRun, whole: LaunchedRun
) -> None:
    job = submit(slurm, launched)
    launched.wait_for_step(15)
    caches = {line for line in environment_of(launched.worker(0)) if "_CACHE_DIR=" in line}
    assert caches == {
        "TRITON_CACHE_DIR=/tmp/snell-scale-root/triton", "TORCHINDUCTOR_CACHE_DIR=/tmp/snell-scale-root/inductor",
    }  # fmt: skip
    slurm.call("scancel", "--signal=USR2", job)  # what --signal=USR2@120 sends before the time limit
    ended = wait_for_end(slurm, job, launched)
    log = (launched.root / "job.log").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert "attempt 0 of job" in log
    assert "attempt 1 of job" in log  # appended to, not written over
    result = launched.result()
    assert (result.status, result.world_size, result.steps) == ("ok", 2, STEPS)
    (resumed_from,) = result.resumed_from_steps
    assert 15 <= resumed_from < STEPS
    # Two processes of one engine: the losses are those of the run that nothing interrupted, bit by bit.
    assert launched.losses() == whole.losses()


def test_a_preempted_job_saves_and_continues(slurm: Cluster, launched: LaunchedRun, whole: LaunchedRun) -> None:
    job = submit(slurm, launched)
    launched.wait_for_step(15)
    os.kill(launched.worker(1), signal.SIGSTOP)  # the run would end before SLURM decides; which wakes it
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={launched.root}/urgent.log")
    slurm.call("sbatch", *urgent, "--wrap=hostname")
    wait_for(lambda: slurm.job(job)["Restarts"] == "1", seconds=120, what="preempted job")
    wait_for((launched.folder / "result.json").exists, seconds=60, what="record of the stopped run")
    assert launched.result().status == "interrupted"  # not killed: it had the seconds of KillWait to save
    ended = wait_for_end(slurm, job, launched)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), (launched.root / "job.log").read_text()
    assert launched.result().resumed_from_steps[0] >= 15
    assert launched.losses() == whole.losses()


def test_a_lost_node_brings_the_job_back_into_the_queue(
    slurm: Cluster, launched: LaunchedRun, whole: LaunchedRun
) -> None:
    job = submit(slurm, launched)
    launched.wait_for_step(25)
    slurm.lose_node("n2")
    wait_for(lambda: slurm.node_state("n2").startswith("DOWN"), seconds=120, what="n2 DOWN")  # SlurmdTimeout
    wait_for(lambda: slurm.job(job)["JobState"] == "PENDING", seconds=120, what="requeued job")
    slurm.start_node("n2")
    ended = wait_for_end(slurm, job, launched)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), (launched.root / "job.log").read_text()
    result = launched.result()
    assert result.resumed_from_steps[0] >= 20
    assert launched.losses() == whole.losses()


def test_the_job_ends_as_the_run_does(slurm: Cluster, launched: LaunchedRun) -> None:
    run = LaunchedRun(launched.root, ("training.lr=1e20",))
    ended = wait_for_end(slurm, submit(slurm, run), run)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "4:0", "0")
    assert run.result().status == "diverged"


def test_a_sweep_of_four_runs(slurm: Cluster, tmp_path: Path) -> None:
    config = LaunchedRun(tmp_path).config
    command = [sys.executable, "-m", "snell_scale.cli", "sweep", config, "--executor", "slurm", "--name", "sweep"]
    varied = ["--grid", "seed=0,1", "training.lr=1e-3,5e-3", "--set", "engine.name=single", "training.steps=6"]
    done = subprocess.run(
        [*command, *varied], env=slurm.environment, cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [read_result(path.parent) for path in sorted((tmp_path / "runs" / "sweep").glob("*/result.json"))]
    assert [result.status for result in results] == ["ok"] * 4
    assert {(r.varied["seed"], r.varied["training.lr"]) for r in results} == {
        (0, 1e-3), (0, 5e-3), (1, 1e-3), (1, 5e-3),
    }  # fmt: skip
