"""`snell-scale sweep`: a study as jobs. Parses, calls, prints."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from snell_scale import registry
from snell_scale.compare import PlannedRun, parse_grid, plan_study
from snell_scale.exit_codes import EXIT_CODES
from snell_scale.records import Result
from snell_scale.results_table import print_results, say
from snell_scale.study_progress import StudyProgress
from snell_scale.sweep.executors import Resources
from snell_scale.sweep.study import Sweep


def sweep(
    study: Annotated[Path, typer.Argument(help="A study file with a grid, or a config and --grid.")],
    *,
    executor: Annotated[str, typer.Option(help="local: jobs on this machine; slurm: jobs of a cluster.")],
    grid: Annotated[list[str] | None, typer.Option(help="key=value,value …, as for compare.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value for every run.")] = None,
    name: Annotated[str | None, typer.Option(help="Folder below output_dir; default: the file's name.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time (local: 1; slurm: all).")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of a run on each of its nodes.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a run.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of a run on each of its nodes.")] = None,
    time: Annotated[
        int | None, typer.Option(min=1, help="Minutes until a job saves and is requeued; default: 240.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="Further key=value for sbatch: account=me.")] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print the commands; start nothing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs; start nothing.")] = False,
    wait: Annotated[bool, typer.Option(help="--no-wait: leave the jobs to SLURM's queue.")] = True,
) -> None:
    """Run a study as jobs; what is done is skipped, what was interrupted or preempted continues.

    Exit code: 0 every run has a result (out of memory and divergence are results), 1 a run failed, 2 bad input,
    75 a run was interrupted: the same command continues.
    """
    extra = _key_values(sbatch or [])
    resources = Resources(executor, jobs, processes, nodes, gpus_per_node, time, partition, extra)
    planned = Sweep(_plan(study, grid or [], settings or [], name), resources)
    if dry_run or print_only:
        say("\n".join(planned.plan() if dry_run else planned.commands()))
    elif wait:
        _wait_for(planned)
    elif executor == "slurm":
        say(f"In the queue: {', '.join(planned.submit())}. The same command without --no-wait waits for them")
    else:
        raise ValueError(
            "--no-wait is for --executor slurm: here the sweep itself starts one run after the other"
        )


def _plan(study: Path, grid: list[str], settings: list[str], name: str | None) -> list[PlannedRun]:
    cells = dict(parse_grid(text) for text in grid)
    return plan_study([study], grid=cells, overrides=settings, name=name, config_class=registry.config_class)


def _wait_for(planned: Sweep) -> None:
    try:
        with StudyProgress(planned.num_runs) as progress:
            results = planned.run(progress.finished)
    except KeyboardInterrupt:
        say(f"stopped: {planned.when_stopped}; the same command continues")
        sys.exit(EXIT_CODES["interrupted"])
    print_results(results)
    say(f"Records: {planned.folder}; what the runs printed: {planned.folder}/.submitit/*.log")
    sys.exit(_exit_code(results))


def _exit_code(results: list[Result]) -> int:
    statuses = {result.status for result in results}
    return next((EXIT_CODES[status] for status in ("failed", "interrupted") if status in statuses), 0)


def _key_values(texts: list[str]) -> Mapping[str, str]:
    pairs = [text.removeprefix("--").partition("=") for text in texts]
    for text, (key, _, value) in zip(texts, pairs, strict=True):
        if not key or not value:
            raise ValueError(f"--sbatch {text!r} is not of the form key=value, e.g. account=vision")
    return {key: value for key, _, value in pairs}
