"""What the launchers would run, and what they refuse: no cluster is needed for that."""

import shlex
import subprocess
import sys

import pytest

from tests.cluster.launched import LAUNCH, environment


def call(launcher: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCH / launcher), *arguments]
    return subprocess.run(
        command, env=environment() | variables, capture_output=True, text=True, timeout=30, check=False
    )


def printed(launcher: str, *arguments: str, **variables: str) -> str:
    done = call(launcher, "--print", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchrun_on_one_machine() -> None:
    expected = (
        f"OMP_NUM_THREADS=1 {shlex.quote(sys.executable)} -m torch.distributed.run --standalone "
        "--nproc-per-node 2 --max-restarts 3 --module snell_scale.cli run c.yaml notes=a\\ b --resume auto"
    )
    assert printed("torchrun.sh", "--nproc-per-node=2", "c.yaml", "notes=a b") == expected


def test_torchrun_on_several_nodes() -> None:
    options = ("--nodes", "4", "--rendezvous", "node1:29400", "--id", "mine", "--max-restarts=0")
    command = printed("torchrun.sh", *options, "c.yaml")
    assert "--nnodes 4 --rdzv-backend c10d --rdzv-endpoint node1:29400 --rdzv-id mine" in command
    assert "--max-restarts 0" in command
    assert "--standalone" not in command


@pytest.mark.parametrize(("devices", "processes"), [("0,1,2", 3), ("5", 1), ("", 1)])
def test_one_process_for_each_gpu_and_one_without(devices: str, processes: int) -> None:
    command = printed("torchrun.sh", "c.yaml", CUDA_VISIBLE_DEVICES=devices)
    assert f"--nproc-per-node {processes} " in command


def test_the_cores_are_divided_among_the_processes() -> None:
    # More processes than cores: one thread each, never none.
    assert printed("torchrun.sh", "--nproc-per-node=100000", "c.yaml", OMP_NUM_THREADS="").startswith(
        "OMP_NUM_THREADS=1 "
    )
    assert printed("torchrun.sh", "c.yaml", OMP_NUM_THREADS="3").startswith("OMP_NUM_THREADS=3 ")


def test_deepspeed_takes_its_own_options() -> None:
    command = printed("deepspeed.sh", "--num_gpus", "2", "--no_ssh", "--master_port=29400", "c.yaml", "seed=1")
    expected = (
        f"{shlex.quote(sys.executable)} -m deepspeed.launcher.runner --no_local_rank --num_gpus 2 --no_ssh "
        "--master_port=29400 --module snell_scale.cli run c.yaml seed=1 --resume auto"
    )
    assert command == expected


@pytest.mark.parametrize(
    ("launcher", "arguments", "told"),
    [
        ("torchrun.sh", [], "no CONFIG"),
        ("torchrun.sh", ["--nodes", "2", "c.yaml"], "needs --rendezvous HOST:PORT"),
        ("torchrun.sh", ["--gpus", "2", "c.yaml"], "unknown option --gpus"),
        ("torchrun.sh", ["--nodes", "two", "c.yaml"], "--nodes is 'two'"),
        ("torchrun.sh", ["--nproc-per-node=0", "c.yaml"], "--nproc-per-node is '0'"),
        ("torchrun.sh", ["c.yaml", "--overwrite"], "--overwrite does not go"),
        ("torchrun.sh", ["c.yaml", "--resume", "never"], "always adds --resume auto"),
        ("deepspeed.sh", ["--num_gpus", "2"], "no CONFIG"),
        ("deepspeed.sh", ["c.yaml", "--overwrite"], "--overwrite does not go"),
        ("slurm.sbatch", ["c.yaml"], "this is a job script"),
    ],
)
def test_bad_usage_is_told_and_ends_with_2(launcher: str, arguments: list[str], told: str) -> None:
    done = call(launcher, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("launcher", ["torchrun.sh", "deepspeed.sh", "slurm.sbatch"])
def test_help_shows_the_exit_codes(launcher: str) -> None:
    done = call(launcher, "--help")
    assert done.returncode == 0
    assert "Exit code: 0 ok, 1 failed" in done.stdout
