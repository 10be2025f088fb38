"""A planned study as a sweep: what is done stands, the rest becomes jobs, and every run ends with a result."""

import contextlib
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

from snell_scale.compare import PlannedRun
from snell_scale.config import to_dict
from snell_scale.records import Result, read_result, write_result, write_yaml
from snell_scale.run_folder import find_finished, locked
from snell_scale.sweep.executors import (
    Resources,
    queued_in_slurm,
    run_locally,
    submit_to_slurm,
    wait_for_slurm,
)
from snell_scale.sweep.job import Meeting, RunJob
from snell_scale.worker_pool import sigterm_interrupts


class Sweep:
    """The runs of a study and where they are to run. Making one starts nothing and writes nothing.

    ValueError for a study of one run, and where a run's folder holds another run.
    """

    def __init__(self, planned: Sequence[PlannedRun], resources: Resources) -> None:
        if not any(run.varied for run in planned):
            raise ValueError(
                "this is one run, not a study: give it a grid (a `grid:` or `cases:` in the file, or "
                "--grid key=value,value), or start it with `snell-scale run`"
            )
        self._runs = {run.config.name: run for run in planned}
        self._resources = resources
        self.folder = _folder_of(planned[0]).parent
        world_size = resources.processes_per_node * resources.num_nodes
        self._standing = {name: _standing(run, world_size) for name, run in self._runs.items()}
        for run in planned:
            if world_size > 1 and run.config.engine.name == "single":
                raise ValueError(
                    f"engine.name is single, but --processes and --nodes ask for {world_size} processes; "
                    "choose an engine for several, e.g. --set engine.name=ddp"
                )

    @property
    def num_runs(self) -> int:
        return len(self._runs)

    @property
    def when_stopped(self) -> str:
        """What has become of the runs under way after a KeyboardInterrupt."""
        if self._resources.executor == "slurm":
            return "the jobs go on in the queue (scancel ends them)"
        return "the runs under way have saved"

    def plan(self) -> list[str]:
        """One line per run: its folder, and what a sweep would do with it."""
        return [
            f"{_folder_of(run)}: {standing.status if standing else 'to continue' if started else 'new'}"
            for name, run in self._runs.items()
            for standing, started in [(self._standing[name], (_folder_of(run) / "config.yaml").exists())]
        ]

    def commands(self) -> list[str]:
        """The sbatch parameters, and the command of every run that has no result yet."""
        jobs = self._jobs()
        lines = []
        if self._resources.executor == "slurm":
            parameters = self._resources.slurm_parameters(name=self.folder.name, num_runs=len(jobs))
            lines = [f"# sbatch through submitit: {key}={value}" for key, value in parameters.items()]
        meeting = Meeting.in_shell() if self._resources.num_nodes > 1 else None
        if meeting is not None:
            lines.append("# on the first node; the others say is_host=0, and have no --local-addr")
        return [*lines, *(" ".join(map(_quoted, job.command(meeting))) for job in jobs.values())]

    def submit(self) -> list[str]:
        """Put what is to be run into SLURM's queue; the ids of its jobs, old and new. Waits for nothing."""
        return sorted(set(self._enqueue().values()))

    def run(self, finished: Callable[[PlannedRun, Result], None]) -> list[Result]:
        """Run everything and wait; results in the order planned. A run that leaves none gets a "failed" one.

        KeyboardInterrupt (SIGINT or SIGTERM): jobs on this machine have saved and ended, jobs of a cluster go on.
        Either way the same call continues.
        """
        results = {name: result for name, result in self._standing.items() if result is not None}
        for name, result in results.items():
            finished(self._runs[name], result)
        with sigterm_interrupts(), contextlib.closing(self._ended()) as ended:
            for name in ended:
                results[name] = self._result_of(name)
                finished(self._runs[name], results[name])
        return [results[name] for name in self._runs]

    def _ended(self) -> Generator[str]:
        if self._resources.executor == "slurm":
            yield from wait_for_slurm(self._enqueue())
        else:
            jobs = self._jobs()
            self._prepare(jobs)
            yield from run_locally(jobs, self._resources, self._hidden)

    def _enqueue(self) -> dict[str, str]:
        """Name → job id of every run without a result; one that is in the queue is not put there again."""
        jobs = self._jobs()
        queued = {name: job for name, job in queued_in_slurm(self._hidden).items() if name in jobs}
        new = {name: job for name, job in jobs.items() if name not in queued}
        self._prepare(new)
        return {**queued, **submit_to_slurm(new, self._resources, self._hidden)}

    def _prepare(self, jobs: Mapping[str, RunJob]) -> None:
        """Write each job's config; drop the results of earlier attempts, so that what is there later is new."""
        for name in jobs:
            folder = _folder_of(self._runs[name])
            if folder.is_dir():
                with locked(folder):  # refused before anything starts, not in the job's log
                    (folder / "result.json").unlink(missing_ok=True)
        self._hidden.mkdir(parents=True, exist_ok=True)
        for name, job in jobs.items():
            write_yaml(job.config_file, to_dict(self._runs[name].config))

    def _jobs(self) -> dict[str, RunJob]:
        return {
            name: RunJob(
                config_file=(self.folder / ".configs" / f"{Path(name).name}.yaml").absolute(),
                varied=run.varied,
                log=(self._hidden / f"{Path(name).name}.log").absolute(),
                working_folder=Path.cwd(),
                processes_per_node=self._resources.processes_per_node,
                num_nodes=self._resources.num_nodes,
                runs_at_a_time=self._resources.runs_at_a_time,
            )
            for name, run in self._runs.items()
            if self._standing[name] is None
        }

    def _result_of(self, name: str) -> Result:
        """What the run recorded, or a failure with the last words of its log."""
        run = self._runs[name]
        folder = _folder_of(run)
        if (folder / "result.json").is_file():
            return read_result(folder)
        from snell_scale.attempt import blank_result

        log = self._hidden / f"{Path(name).name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it did not start")
        result = blank_result(run.config, run.varied, message=f"{last} (log: {log})")
        write_result(folder, result)
        return result

    @property
    def _hidden(self) -> Path:
        """submitit's pickles and logs, and one log per run."""
        return self.folder / ".submitit"


def _folder_of(run: PlannedRun) -> Path:
    return Path(run.config.output_dir) / run.config.name


def _quoted(word: str) -> str:
    """As a shell reads it; SLURM's variables stay variables."""
    return f'"{word}"' if "SLURM_" in word else shlex.quote(word)


def _standing(run: PlannedRun, world_size: int) -> Result | None:
    folder = _folder_of(run)
    return find_finished(folder, run.config, resume="auto", overwrite=False, world_size=world_size)
