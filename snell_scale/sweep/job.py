"""What one job of a sweep does on its node: start the run's processes, and stop them in time to be requeued."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from snell_scale.exit_codes import EXIT_CODES

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

_ENDED_WITH_A_RESULT = tuple(EXIT_CODES[status] for status in ("ok", "oom", "diverged"))
# A batch system sends SIGUSR2 to every process of a job. It means "save and stop" to the run, which handles it;
# it would kill torchrun's agent, and a run that is still importing.
_OUTLIVE_SIGUSR2 = ("sh", "-c", "trap '' USR2; exec \"$@\"", "sh")
_MAX_RESTARTS = 3  # of a group with a crashed process, by torchrun, from the newest checkpoint
# No restarted group meets in the store of the one before: launch/torchrun.sh says why.
_FRESH_STORES = ("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
_POLL_SECONDS = 0.2
_SECONDS_BETWEEN_SIGNALS = 1.0


# Those of launch/slurm.sbatch: jobs of either kind have other numbers, so other ports.
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of a run meet: at the first one."""

    id: str
    address: str
    port: str
    is_first: bool

    @classmethod
    def from_slurm(cls, environment: Mapping[str, str]) -> "Meeting":
        job = environment["SLURM_JOB_ID"]
        return cls(
            id=f"{job}-{environment.get('SLURM_RESTART_COUNT', '0')}",
            # srun is called in the batch script, so it is called on the first node.
            address=environment["SLURM_LAUNCH_NODE_IPADDR"],
            port=str(_FIRST_PORT + int(job) % _NUM_PORTS),
            is_first=environment["SLURM_NODEID"] == "0",
        )

    @classmethod
    def in_shell(cls) -> "Meeting":
        """What `from_slurm` makes of the first node's environment, for a shell on that node to fill in."""
        port = f"$(({_FIRST_PORT} + SLURM_JOB_ID % {_NUM_PORTS}))"
        id = "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        return cls(id, "$SLURM_LAUNCH_NODE_IPADDR", port, is_first=True)


@dataclass
class RunJob:
    """One run, as submitit pickles it, calls it in the job, and checkpoints it before the job is requeued."""

    config_file: Path
    varied: Mapping[str, Any]
    log: Path
    working_folder: Path
    processes_per_node: int
    num_nodes: int
    # Runs that share this node's cores.
    runs_at_a_time: int = 1
    # Variables to set for the run, or to take away (None).
    environment: Mapping[str, str | None] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _stop_requested: bool = field(default=False, init=False)

    def __call__(self) -> None:
        """Start the run on this node and wait. SystemExit with the run's exit code if it left no result."""
        meeting = Meeting.from_slurm(os.environ) if self.num_nodes > 1 else None
        # A sweep that is stopped sends it; submitit itself would ignore it.
        signal.signal(signal.SIGTERM, self._request_stop)
        is_first = meeting is None or meeting.is_first
        log = self.log if is_first else self.log.with_suffix(f".node{os.environ['SLURM_NODEID']}.log")
        with tempfile.TemporaryDirectory() as scratch, log.open("ab") as output:
            exit_file = Path(scratch) / "exit"
            self._process = subprocess.Popen(
                [*_OUTLIVE_SIGUSR2, *self.command(meeting)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.working_folder,
                env=self._run_environment(exit_file),
                start_new_session=True,  # a terminal's Ctrl-C is the sweep's, which stops its jobs itself
            )
            while self._process.poll() is None:
                if self._stop_requested:
                    self._tell_to_stop()
                time.sleep(_POLL_SECONDS)
            code = int(exit_file.read_text()) if exit_file.exists() else self._process.returncode
        if code == EXIT_CODES["interrupted"] and not is_first:
            return  # a failing task may end the whole step, and with it the first node's, which is being requeued
        if code not in _ENDED_WITH_A_RESULT:
            raise SystemExit(code if code > 0 else 128 - code)

    def command(self, meeting: Meeting | None) -> list[str]:
        """The command line of the run on this node; `meeting` if it has several."""
        run = ["run", str(self.config_file), "--resume", "auto", "--varied", json.dumps(dict(self.varied))]
        if self.processes_per_node * self.num_nodes == 1:
            return [sys.executable, "-m", "snell_scale.cli", *run]
        where = ["--standalone"]
        if meeting is not None:
            where = [
                f"--nnodes={self.num_nodes}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={meeting.address}:{meeting.port}",
                f"--rdzv-id={meeting.id}",
                # Told, not guessed from names, which need not be known to a resolver.
                f"--rdzv-conf=is_host={int(meeting.is_first)}",
                *([f"--local-addr={meeting.address}"] if meeting.is_first else []),
            ]
        processes = [f"--nproc-per-node={self.processes_per_node}", f"--max-restarts={_MAX_RESTARTS}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *where, *processes]
        return [*_FRESH_STORES, *torchrun, "--module", "snell_scale.cli", *run]

    def checkpoint(self) -> "DelayedSubmission":
        """Called by submitit before a time limit or preemption: stop the run; what to call the next time."""
        from submitit.helpers import DelayedSubmission

        # Popen.wait would deadlock: this is a signal handler, and may interrupt Popen.poll.
        while self._process is not None and _is_alive(self._process.pid):
            self._tell_to_stop()
            time.sleep(_SECONDS_BETWEEN_SIGNALS)
        return DelayedSubmission(replace(self))

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def _tell_to_stop(self) -> None:
        """SIGUSR2 to the run, and to torchrun's workers; again and again, for it is lost on one that imports."""
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            workers = process.children() if self.processes_per_node * self.num_nodes > 1 else []
            for target in (process, *workers):
                target.send_signal(signal.SIGUSR2)

    def _run_environment(self, exit_file: Path) -> dict[str, str]:
        # torchrun makes 1 of every exit code: a run under it writes its own into this file.
        environment = {**os.environ, "SNELL_SCALE_EXIT_FILE": str(exit_file)}
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_threads = max(1, num_cores // (self.processes_per_node * self.runs_at_a_time))
        environment.setdefault("OMP_NUM_THREADS", str(num_threads))
        for key, value in self.environment.items():
            environment.pop(key, None)
            if value is not None:
                environment[key] = value
        return environment


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
