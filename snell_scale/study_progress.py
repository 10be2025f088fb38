"""What a comparison shows while its runs work: a bar on a terminal, and one line per finished run anywhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from snell_scale.compare import PlannedRun
from snell_scale.metrics import metric
from snell_scale.records import Result


class StudyProgress:
    """Counts finished runs; use as a context manager around `run_study`."""

    def __init__(self, num_runs: int) -> None:
        self._num_runs = num_runs
        self._num_done = 0
        self._started = time.monotonic()
        self._console = Console(soft_wrap=True)
        columns = (
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not sys.stdout.isatty())
        self._task = self._bar.add_task("runs", total=num_runs)

    def __enter__(self) -> "StudyProgress":
        self._bar.start()
        self._console.print(f"{self._num_runs} runs", highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def finished(self, planned: PlannedRun, result: Result) -> None:
        """Report one run."""
        self._num_done += 1
        self._bar.advance(self._task)
        # Validation, not test: this line is watched while settings are being chosen.
        name = result.metric or ""
        value = result.metrics.get("validation", {}).get(name)
        figure = (result.message or "")[:120]
        if value is not None:
            figure = f"validation {name} {value:.{max(2, metric(name).digits)}f}"
        seconds = result.seconds.get("total")
        took = f"{seconds:.0f} s" if seconds is not None else ""
        count = f"[{self._num_done}/{self._num_runs}]".rjust(9)
        text = f"{count} {planned.config.name:<36} {result.status:<11} {figure}  {took}"
        self._console.print(text, markup=False, highlight=False)
