"""A small run as a launcher starts it: its config, its records, its processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from snell_scale.records import Result, read_result, read_steps
from tests.cluster.waiting import wait_for
from tests.conftest import TINY

LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 100  # on two processes some seconds: long enough to be interrupted
CHECKPOINT_EVERY = 10


@dataclass(frozen=True)
class LaunchedRun:
    """The tiny run on several processes, below a folder of its own."""

    root: Path
    settings: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "tiny"

    @property
    def config(self) -> Path:
        """The config file, written when it is first asked for."""
        path = self.root / "launched.yaml"
        if not path.exists():
            content: dict[str, Any] = {
                **TINY,
                "output_dir": str(self.root / "runs"),
                "engine": {"name": "ddp", "device": "cpu", "precision": "fp32", "cpu_threads": 1},
                "training": {**TINY["training"], "steps": STEPS},
                "evaluation": {"every_steps": STEPS, "batch_size": 16},
                "checkpoint": {"every_steps": CHECKPOINT_EVERY, "keep_last": 2},
                "logging": {"every_steps": 1, "memory_at_step": None, "warmup_steps": 2},
            }
            path.write_text(yaml.safe_dump(content))
        return path

    def start(self, launcher: str, *options: str, log: str = "log") -> subprocess.Popen[bytes]:
        """launch/LAUNCHER options CONFIG settings, in the background; what it prints goes to root/log."""
        command = [LAUNCH / launcher, *options, self.config, *self.settings]
        with (self.root / log).open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=environment(), cwd=self.root)

    def wait_for_step(self, step: int, *, seconds: float = 300) -> None:
        def reached() -> bool:
            lines = read_steps(self.folder) if (self.folder / "steps.jsonl").exists() else []
            return bool(lines) and lines[-1]["step"] >= step

        wait_for(reached, seconds=seconds, what=f"step {step}")

    def result(self) -> Result:
        return read_result(self.folder)

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every training step, as recorded."""
        return [(line["step"], line["loss"]) for line in read_steps(self.folder) if "lr" in line]

    def worker(self, rank: int) -> int:
        """The process id of a rank."""
        found = [pid for pid in self.processes() if f"RANK={rank}" in environment_of(pid)]
        assert len(found) == 1, f"rank {rank} has processes {found}"
        return found[0]

    def processes(self) -> Iterator[int]:
        """Ids of all processes of this run: the launcher's, torchrun's, the workers'."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and str(self.config).encode() in (entry / "cmdline").read_bytes():
                    yield int(entry.name)

    def kill_all(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def assert_no_process(self) -> None:
        assert list(self.processes()) == []


def environment() -> dict[str, str]:
    """This process's environment without what an outer job or launcher left in it."""
    outer = ("SLURM_", "SBATCH_", "PET_", "TORCH", "TRITON_CACHE", "SNELL_SCALE_", "OMP_NUM_THREADS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    return kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment_of(pid: int) -> set[str]:
    """NAME=value of a process as it was started; empty where it has ended."""
    with contextlib.suppress(OSError):
        return set(Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
    return set()
