"""A sweep in a SLURM queue that is played by scripts; tests/cluster has a real one."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from snell_scale import registry
from snell_scale.config import load_config
from snell_scale.records import read_result
from snell_scale.run_folder import locked
from snell_scale.sweep import executors
from snell_scale.sweep.executors import Resources
from snell_scale.sweep.study import Sweep
from tests.sweep.planned import Call, folder_of, plan, record


class Queue:
    """SLURM's commands as scripts: what sbatch was given, and what squeue is to answer."""

    def __init__(self, folder: Path) -> None:
        self.jobs = folder / "jobs"
        self.script = folder / "script"
        self.count = folder / "count"
        self.jobs.write_text("")
        self.count.write_text("")
        scripts = {
            "srun": "exit 1",
            "squeue": f'cat "{self.jobs}"',
            "sbatch": f'cp "$1" "{self.script}"; echo x >> "{self.count}"; echo Submitted batch job 7',
        }
        for name, text in scripts.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)

    def show(self, ids: Sequence[str]) -> None:
        self.jobs.write_text("\n".join(ids))

    @property
    def num_submissions(self) -> int:
        return len(self.count.read_text().split())


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(executors, "_SLURM_POLL_SECONDS", 0.05)
    return Queue(folder)


def test_slurm_gets_an_array_once_and_is_waited_for(tiny_file: Path, queue: Queue) -> None:
    planned = plan(tiny_file)
    record(planned[0], "ok")
    record(planned[1], "interrupted")
    resources = Resources(
        "slurm", num_jobs=2, minutes=90, partition="gpu", gpus_per_node=4, sbatch={"account": "me"}
    )
    assert Sweep(planned, resources).submit() == ["7_0", "7_1", "7_2"]
    script = queue.script.read_text()
    for line in (
        "--array=0-2%2", "--time=90", "--partition=gpu", "--account=me", "--requeue", "--gpus-per-node=4",
        "--signal=USR2@120", "--nodes=1", "--job-name=s",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert not (folder_of(planned[1]) / "result.json").exists()  # what is there later is the job's
    config_file = folder_of(planned[1]).with_name(".configs") / "seed1.yaml"
    assert load_config(config_file, config_class=registry.config_class) == planned[1].config

    queue.show(["7_0", "7_2"])  # the job of seed 2 is over, and left no record
    assert Sweep(planned, resources).submit() == ["7", "7_0", "7_2"]
    assert queue.num_submissions == 2
    assert "--array" not in queue.script.read_text()


def test_a_sweep_waits_for_jobs_of_an_earlier_call(tiny_file: Path, queue: Queue) -> None:
    planned = plan(tiny_file, 3)
    record(planned[0], "diverged")
    resources = Resources("slurm")
    Sweep(planned, resources).submit()
    queue.show(["7_0", "7_1"])
    seen: list[str] = []

    def finish() -> None:
        assert seen == ["s/seed0"]
        record(planned[2], "oom")
        queue.show([])

    timer = threading.Timer(0.5, finish)
    timer.start()
    results = Sweep(planned, resources).run(lambda run, result: seen.append(run.config.name))
    timer.join()
    assert queue.num_submissions == 1
    assert [result.status for result in results] == ["diverged", "failed", "oom"]
    assert "it did not start" in (results[1].message or "")
    assert read_result(folder_of(planned[1])).varied == {"seed": 1}  # no row of a study is lost
    assert sorted(seen) == ["s/seed0", "s/seed1", "s/seed2"]


def test_a_requeued_job_has_not_ended(tiny_file: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[set[str] | None] = [{"7"}, set(), {"7"}, None, None, set(), set()]
    monkeypatch.setattr(executors, "_queue", lambda: answers.pop(0))
    assert list(executors.wait_for_slurm({"a": "7"})) == ["a"]
    assert not answers


def test_what_sbatch_refuses_is_told(tiny_file: Path, queue: Queue, snell: Call) -> None:
    sbatch = queue.script.with_name("sbatch")
    sbatch.write_text("#!/bin/sh\necho invalid partition specified >&2; exit 1\n")
    code, _, err = snell("sweep", tiny_file, "--executor", "slurm", "--grid", "seeds=0,1", "--partition", "x")
    assert code == 2
    assert "error: sbatch refused the jobs: invalid partition specified" in err


def test_a_run_under_way_elsewhere_is_not_started_again(tiny_file: Path, queue: Queue) -> None:
    planned = plan(tiny_file, 2)
    with locked(folder_of(planned[1])), pytest.raises(ValueError, match="another process is running"):
        Sweep(planned, Resources("slurm")).submit()
    assert queue.num_submissions == 0
