"""What a job does on its node: where nodes meet, how it ends, and that its run saves."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from snell_scale.sweep.job import Meeting, RunJob


def test_printed_meeting_is_the_one_of_the_job() -> None:
    job = RunJob(Path("c.yaml"), {}, Path("c.log"), Path(), processes_per_node=2, num_nodes=2)
    variables = {"SLURM_JOB_ID": "40123", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_NODEID": "0"}
    words = job.command(Meeting.from_slurm(variables))
    assert "--rdzv-endpoint=10.0.0.1:10123" in words
    assert "--rdzv-conf=is_host=1" in words
    shown = " ".join(f'"{word}"' for word in job.command(Meeting.in_shell()))
    script = f"printf '%s\\n' {shown}"
    filled = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert filled.stdout.splitlines() == words
    others = job.command(Meeting.from_slurm({**variables, "SLURM_NODEID": "1"}))
    assert set(others) ^ set(words) == {
        "--rdzv-conf=is_host=0", "--rdzv-conf=is_host=1", "--local-addr=10.0.0.1",
    }  # fmt: skip


def test_torchrun_is_told_to_make_a_store_for_every_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tests/cluster sees torchrun heed the variable.
    torchrun = tmp_path / "python"
    torchrun.write_text('#!/bin/sh\necho "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE $2"\n')
    torchrun.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(torchrun))
    RunJob(Path("c.yaml"), {}, tmp_path / "c.log", tmp_path, processes_per_node=2, num_nodes=1)()
    assert (tmp_path / "c.log").read_text() == "1 torch.distributed.run\n"


class Script(RunJob):
    """A job whose run is a few lines of Python."""

    script = ""

    def command(self, meeting: Meeting | None) -> list[str]:
        return [sys.executable, "-c", self.script]


def script_job(tmp_path: Path, script: str) -> Script:
    job = Script(tmp_path / "c.yaml", {}, tmp_path / "c.log", tmp_path, processes_per_node=1, num_nodes=1)
    job.script = script
    return job


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("raise SystemExit(3)", None),  # out of memory: a result
        ("raise SystemExit(1)", 1),
        ("import os; open(os.environ['SNELL_SCALE_EXIT_FILE'], 'w').write('4')", None),
        ("import os; open(os.environ['SNELL_SCALE_EXIT_FILE'], 'w').write('75'); raise SystemExit(1)", 75),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGUSR2); raise SystemExit(5)", 5),  # outlived
        ("import os; raise SystemExit('CUDA_VISIBLE_DEVICES' in os.environ or os.environ['A'] != 'b')", None),
    ],
)
def test_a_job_ends_as_its_run(
    script: str, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    job = script_job(tmp_path, script)
    job.environment = {"CUDA_VISIBLE_DEVICES": None, "A": "b"}
    if code is None:
        job()
        return
    with pytest.raises(SystemExit) as ended:
        job()
    assert ended.value.code == code


_SAVES = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").write_text("yes")
    sys.exit(75)
time.sleep(1.5)  # imports: a signal that comes now is lost
signal.signal(signal.SIGUSR2, save)
time.sleep(60)
"""


@pytest.mark.parametrize(("node", "code"), [("0", 75), ("1", None)])
def test_only_the_first_node_fails_where_a_run_was_stopped(
    node: str, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"JOB_ID": "7", "LAUNCH_NODE_IPADDR": "10.0.0.1", "NODEID": node}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    job = script_job(tmp_path, "print('hello'); raise SystemExit(75)")
    job.num_nodes = 2
    if code is None:
        job()
    else:
        with pytest.raises(SystemExit, match=str(code)):
            job()
    log = "c.log" if node == "0" else "c.node1.log"
    assert (tmp_path / log).read_text() == "hello\n"


@pytest.mark.parametrize("way", ["stopped", "requeued"])
def test_a_job_lets_its_run_save(way: str, tmp_path: Path) -> None:
    job = script_job(tmp_path, _SAVES)
    again: list[object] = []

    def requeue(*_: object) -> None:  # as submitit's own handler
        again.append(job.checkpoint().function)
        raise SystemExit(144)

    signal.signal(signal.SIGUSR2, requeue)
    number = signal.SIGTERM if way == "stopped" else signal.SIGUSR2
    timer = threading.Timer(0.7, os.kill, (os.getpid(), number))
    timer.start()
    with pytest.raises(SystemExit) as ended:
        job()
    timer.join()
    assert (tmp_path / "saved").read_text() == "yes"
    assert ended.value.code == (75 if way == "stopped" else 144)
    if way == "requeued":
        assert isinstance(again[0], RunJob)
        assert again[0]._process is None  # it is pickled
        assert again[0].config_file == job.config_file
