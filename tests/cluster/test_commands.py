"""What the launchers would run, and what they refuse: no cluster is needed for that."""

import shlex
import subprocess
import sys

import pytest

from tests.cluster.launched import LAUNCH, environment

# The threads are `environment`'s; --print shows the variables, for without them another command would run.
TORCHRUN = (
    f"env OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 {shlex.quote(sys.executable)} "
    "-m torch.distributed.run"
)


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
        f"{TORCHRUN} --standalone --nproc-per-node 2 --max-restarts 3 "
        "--module snell_scale.cli run c.yaml notes=a\\ b --resume auto"
    )
    assert printed("torchrun.sh", "--nproc-per-node=2", "c.yaml", "notes=a b") == expected


def test_torchrun_on_several_nodes() -> None:
    options = ("--nodes", "4", "--rendezvous", "node1:29400", "--id", "mine", "--max-restarts=0")
    command = printed("torchrun.sh", *options, "c.yaml")
    assert "--nnodes 4 --rdzv-backend c10d --rdzv-endpoint node1:29400 --rdzv-id mine" in command
    assert "--max-restarts 0" in command
    assert "--standalone" not in command


def test_other_runs_on_the_same_port_have_another_meeting() -> None:
    def meeting(*run: str) -> str:
        words = shlex.split(printed("torchrun.sh", "--nodes", "2", "--rendezvous", "node1:29400", *run))
        return words[words.index("--rdzv-id") + 1]

    names = {meeting("c.yaml"), meeting("c.yaml", "seed=1"), meeting("d.yaml"), meeting("c.yaml")}
    assert len(names) == 3
    assert all(name.startswith("snell-scale-") for name in names)


@pytest.mark.parametrize(("devices", "processes"), [("0,1,2", 3), ("5", 1), ("", 1)])
def test_one_process_for_each_gpu_and_one_without(devices: str, processes: int) -> None:
    command = printed("torchrun.sh", "c.yaml", CUDA_VISIBLE_DEVICES=devices)
    assert f"--nproc-per-node {processes} " in command


@pytest.mark.cluster  # torchrun and a worker import torch: seconds
def test_what_is_printed_runs_as_it_is() -> None:
    command = printed("torchrun.sh", "no such file.yaml")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert "no config file at no such file.yaml" in done.stderr


def test_the_cores_are_divided_among_the_processes() -> None:
    # More processes than cores: one thread each, never none.
    assert printed("torchrun.sh", "--nproc-per-node=100000", "c.yaml", OMP_NUM_THREADS="").startswith(
        "env OMP_NUM_THREADS=1 "
    )
    assert printed("torchrun.sh", "c.yaml", OMP_NUM_THREADS="3").startswith("env OMP_NUM_THREADS=3 ")


def test_deepspeed_takes_its_own_options() -> None:
    options = (
        "--num_gpus",
        "2",
        "-q",
        "--no_ssh",
        "--node_rank=0",
        "--master_addr",
        "node1",
        "--master_port=29400",
    )
    command = printed("deepspeed.sh", *options, "c.yaml", "seed=1")
    expected = (
        f"{shlex.quote(sys.executable)} -m deepspeed.launcher.runner --no_local_rank {' '.join(options)} "
        "--module snell_scale.cli run c.yaml seed=1 --resume auto"
    )
    assert command == expected


def test_the_job_script_shows_what_every_node_runs() -> None:
    command = printed("slurm.sbatch", "c.yaml", "engine.name=fsdp2", NPROC_PER_NODE="8")
    srun, _, torchrun = command.partition(" launch/")
    assert srun.startswith("srun --nodes=NODES --ntasks-per-node=1")
    torchrun = torchrun.replace("NODES", "16").replace("FIRST_NODE:PORT", "node1:10007")
    on_a_node = printed(*shlex.split(torchrun))  # the launcher takes the options that it is given
    assert "--nnodes 16 --rdzv-backend c10d --rdzv-endpoint node1:10007 --rdzv-id JOB-ATTEMPT" in on_a_node
    assert "--nproc-per-node 8 " in on_a_node
    assert on_a_node.endswith("run c.yaml engine.name=fsdp2 --resume auto")


@pytest.mark.parametrize(
    ("launcher", "arguments", "told"),
    [
        ("torchrun.sh", [], "no CONFIG"),
        ("torchrun.sh", ["--nodes", "2", "c.yaml"], "needs --rendezvous HOST:PORT"),
        ("torchrun.sh", ["--nodes", "2", "--rendezvous", "node1", "c.yaml"], "it is 'node1', e.g. node1:29400"),
        ("torchrun.sh", ["--rendezvous", "node1:29400", "c.yaml"], "add --nodes N"),
        ("torchrun.sh", ["--nproc-per-node"], "--nproc-per-node needs a value"),
        ("torchrun.sh", ["--max-restarts=-1", "c.yaml"], "--max-restarts is '-1', expected a number of 0"),
        ("torchrun.sh", ["c.yaml", "--nodes", "2"], "--nodes came after CONFIG"),
        ("torchrun.sh", ["--gpus", "2", "c.yaml"], "unknown option --gpus"),
        ("torchrun.sh", ["--nodes", "two", "c.yaml"], "--nodes is 'two'"),
        ("torchrun.sh", ["--nproc-per-node=0", "c.yaml"], "--nproc-per-node is '0'"),
        ("torchrun.sh", ["c.yaml", "--overwrite"], "--overwrite does not go"),
        ("torchrun.sh", ["c.yaml", "--resume", "never"], "always adds --resume auto"),
        ("deepspeed.sh", ["--num_gpus", "2"], "no CONFIG"),
        ("deepspeed.sh", ["c.yaml", "--overwrite"], "--overwrite does not go"),
        ("deepspeed.sh", ["c.yaml", "--num_gpus", "2"], "--num_gpus came after CONFIG"),
        ("deepspeed.sh", ["--num_gpus=0", "c.yaml"], "--num_gpus is '0'"),
        # deepspeed itself would run one process on this machine.
        ("deepspeed.sh", ["--hostfile", "nowhere", "c.yaml"], "--hostfile is 'nowhere', expected a file"),
        ("deepspeed.sh", ["--no_ssh", "--node_rank", "0", "c.yaml"], "--no_ssh needs --master_addr"),
        ("slurm.sbatch", ["c.yaml"], "this is no job: sbatch [options]"),
        ("slurm.sbatch", ["--print"], "no CONFIG given: sbatch [options]"),
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
