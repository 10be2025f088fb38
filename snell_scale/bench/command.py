"""What every benchmark's command does around it: check, run, write the record, print it, exit."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from snell_scale.bench.settings import (
    EnginesSettings,
    GpuSettings,
    LoopSettings,
    MergeSettings,
    StepSettings,
)

if TYPE_CHECKING:
    from snell_scale.bench_records import BenchRecord

_S = TypeVar("_S", MergeSettings, StepSettings, GpuSettings, LoopSettings, EnginesSettings)
_T = TypeVar("_T", MergeSettings, StepSettings)
_INTERRUPTED = 130


def run_bench(command: str, settings: _S, bench: Callable[..., object], output: Path | None) -> "BenchRecord":
    """Check, run, write the record, print it."""
    settings.check_all()
    # Kineto tells of every start and stop between our lines, at the severity 5; it reads this at its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import torch

    from snell_scale.bench.progress import BenchProgress
    from snell_scale.bench.report import (
        check_device,
        check_implementation,
        output_folder,
        print_aims,
        print_rows,
        write_findings,
    )

    device = check_device(settings.device)
    check_implementation(getattr(settings, "implementation", "auto"), device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = output or Path("runs/bench") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    with output_folder(folder) as full_path:
        try:
            record = write_findings(
                f"bench {command}",
                partial(bench, settings, BenchProgress()),
                settings=asdict(settings),
                device=device,
                dtype=settings.dtype,
                output=full_path,
            )
        except KeyboardInterrupt:
            print("interrupted before anything was timed: there is no record", file=sys.stderr)
            sys.exit(_INTERRUPTED)
    print_rows(record, _console())
    if record.aims:
        print_aims(record, _console())
    print(f"Record: {folder}/bench.json")
    return record


def with_all_sides(settings: _T, sides: str | None) -> _T:
    """Checked; with the side that depends on this machine's libraries, where the user named none."""
    settings.check_all()
    if sides is not None:
        return settings
    from snell_scale.bench.cpu_libraries import with_default_sides

    return with_default_sides(settings)


def finish(record: "BenchRecord") -> None:
    """Exit code 130 where the user stopped it, 1 where something could not be measured."""
    sys.exit(_INTERRUPTED if record.interrupted else 1 if any(row.error for row in record.rows) else 0)


def _console() -> Console:
    # Wide where nobody watches: a log must not lose the end of a line.
    return Console() if sys.stdout.isatty() else Console(width=160)
