"""Where the jobs of a sweep run: on this machine, a few at a time, or in a SLURM cluster's queue."""

import contextlib
import getpass
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from snell_scale.records import write_json
from snell_scale.sweep.job import RunJob

if TYPE_CHECKING:
    from submitit import Job, LocalExecutor

EXECUTORS = ("local", "slurm")
_MINUTES = 240  # of a SLURM job, unless said otherwise: a run that needs more is requeued and continues
_MAX_REQUEUES = 1000
_SECONDS_TO_SAVE = 120  # from the warning to the time limit
_NO_LIMIT_MINUTES = 60 * 24 * 365
_LOCAL_POLL_SECONDS = 0.2
_SLURM_POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Resources:
    """What every run of a sweep gets, and how many run at a time (None: one here, all on a cluster)."""

    executor: str
    num_jobs: int | None = None
    processes_per_node: int = 1
    num_nodes: int = 1
    gpus_per_node: int | None = None
    minutes: int | None = None
    partition: str | None = None
    sbatch: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ValueError(f"--executor is {self.executor!r}, expected one of {', '.join(EXECUTORS)}")
        for_a_queue = {
            "--nodes": self.num_nodes > 1,
            "--time": self.minutes,
            "--partition": self.partition,
            "--sbatch": self.sbatch,
        }
        for option, given in for_a_queue.items():
            if given and self.executor == "local":
                raise ValueError(f"{option} is for --executor slurm: this machine is one node without a queue")
        self.visible_devices(self.runs_at_a_time - 1)  # refuses what there is not

    @property
    def runs_at_a_time(self) -> int:
        """On one machine; a cluster gives every run cores of its own."""
        return (self.num_jobs or 1) if self.executor == "local" else 1

    def visible_devices(self, slot: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of the run in this slot of the machine: its own, or all if it asked for none."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if self.executor == "slurm" or not self.gpus_per_node:
            return visible
        end = (slot + 1) * self.gpus_per_node
        devices = visible.split(",") if visible is not None else [str(index) for index in range(end)]
        if end > len(devices):
            raise ValueError(
                f"{self.runs_at_a_time} runs at a time (--jobs) with --gpus-per-node {self.gpus_per_node} need "
                f"{end} GPUs, but CUDA_VISIBLE_DEVICES is {visible!r}; lower one of them"
            )
        return ",".join(devices[end - self.gpus_per_node : end])

    def slurm_parameters(self, *, name: str, num_runs: int) -> dict[str, Any]:
        """What submitit makes the sbatch script from."""
        minutes = self.minutes or _MINUTES
        parameters: dict[str, Any] = {
            "job_name": name,
            "nodes": self.num_nodes,
            "ntasks_per_node": 1,  # one torchrun agent, or the run itself
            "cpus_per_task": self.processes_per_node,
            "gpus_per_node": self.gpus_per_node,
            "partition": self.partition,
            "time": minutes,
            "signal_delay_s": min(_SECONDS_TO_SAVE, minutes * 60 // 2),
            "array_parallelism": min(self.num_jobs or num_runs, num_runs),
            "stderr_to_stdout": True,
            # A node that dies gives the job back to the queue.
            "additional_parameters": {"requeue": True, **self.sbatch},
        }
        cores = self.sbatch.get("cpus-per-task", self.processes_per_node)
        parameters["srun_args"] = [f"--cpus-per-task={cores}"]  # since 22.05 srun does not take over sbatch's
        return {key: value for key, value in parameters.items() if value is not None}


def run_locally(jobs: Mapping[str, RunJob], resources: Resources, folder: Path) -> Generator[str]:
    """Run the jobs here; the name of each as it ends. Closed early, it stops what runs, which saves."""
    executor = _submitit().LocalExecutor(folder)
    executor.update_parameters(timeout_min=_NO_LIMIT_MINUTES, stderr_to_stdout=True)
    queue = list(jobs.items())
    slots = list(range(resources.runs_at_a_time))
    running: dict[str, tuple[int, Job[None]]] = {}
    try:
        while queue or running:
            while queue and slots:
                name, job = queue.pop(0)
                slot = slots.pop(0)
                environment = {"CUDA_VISIBLE_DEVICES": resources.visible_devices(slot)}  # submitit hides all GPUs
                running[name] = slot, _start(executor, replace(job, environment=environment))
            for name, (slot, started) in list(running.items()):
                if started.done():
                    del running[name]
                    slots.append(slot)
                    yield name
            time.sleep(_LOCAL_POLL_SECONDS)
    finally:
        _stop([started for _, started in running.values()])


def submit_to_slurm(jobs: Mapping[str, RunJob], resources: Resources, folder: Path) -> dict[str, str]:
    """Put the jobs into the queue, as one array; name → job id. ValueError if sbatch refuses."""
    if not jobs:
        return {}
    submitit = _submitit()
    if shutil.which("sbatch") is None:
        raise ValueError(
            "--executor slurm needs SLURM's sbatch, which is not on PATH; here, use --executor local"
        )
    executor = submitit.SlurmExecutor(folder, max_num_timeout=_MAX_REQUEUES)
    executor.update_parameters(**resources.slurm_parameters(name=folder.parent.name, num_runs=len(jobs)))
    try:
        submitted = executor.submit_array(list(jobs.values()))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise ValueError(f"sbatch refused the jobs: {error}; --print shows what it is asked for") from None
    ids = {name: job.job_id for name, job in zip(jobs, submitted, strict=True)}
    write_json(folder / "jobs.json", {**_submitted_earlier(folder), **ids})
    return ids


def queued_in_slurm(folder: Path) -> dict[str, str]:
    """Name → job id of what an earlier call has put into the queue, and is still there or running."""
    earlier = _submitted_earlier(folder)
    queued = _queue() if earlier else set()
    return {name: job for name, job in earlier.items() if queued is None or job in queued}


def wait_for_slurm(ids: Mapping[str, str]) -> Generator[str]:
    """The name of each job as it has left the queue for good."""
    waiting = dict(ids)
    missing_before: set[str] = set()
    while waiting:
        queued = _queue()
        missing = {name for name, job in waiting.items() if queued is not None and job not in queued}
        # Twice: a job that is requeued must not look ended, nor one whose last files have yet to arrive.
        for name in sorted(missing & missing_before):
            del waiting[name]
            yield name
        missing_before = missing
        if waiting:
            time.sleep(_SLURM_POLL_SECONDS)


def _submitit() -> ModuleType:
    try:
        import submitit
    except ImportError:
        raise ValueError('a sweep needs submitit, which is missing: pip install "snell-scale[cluster]"') from None
    return submitit


def _start(executor: "LocalExecutor", job: RunJob) -> "Job[None]":
    """Submitted so that a terminal's Ctrl-C, which reaches every process, leaves submitit's alive: they save."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit(job)
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(jobs: "list[Job[None]]") -> None:
    """SIGTERM to each job until it has ended: one that has yet to start does not hear the first."""
    deadline = time.monotonic() + _SECONDS_TO_SAVE
    while living := [job for job in jobs if not job.done()]:
        number = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
        for job in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.job_id), number)  # submitit's local job id is the process id
        time.sleep(1.0)


def _queue() -> set[str] | None:
    """Ids of this user's jobs that are queued or running; None if SLURM does not answer just now.

    squeue, for submitit's own way (sacct) needs accounting, which a cluster need not have.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(answer.stdout.split()) if answer.returncode == 0 else None


def _submitted_earlier(folder: Path) -> dict[str, str]:
    path = folder / "jobs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
