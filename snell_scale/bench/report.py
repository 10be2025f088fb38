"""What a benchmark found, gathered into a record and shown as a table."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snell_scale.bench.memory import memory_source
from snell_scale.bench_records import BASES, FIGURES, FILE_NAME, Aim, BenchRecord, Figure, Gate, Row, write_bench
from snell_scale.instrument.environment import collect_environment
from snell_scale.kernels.merge.choice import choose_implementation

MIB = 2**20


class RedGate(ValueError):
    """What would have been timed computes something else than the reference does."""


@dataclass
class Findings:
    """Gathered while a benchmark runs."""

    gates: list[Gate] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)
    memory_source: str | None = None
    """Where a benchmark measures memory by a way of its own."""

    def add_gates(self, gates: Sequence[Gate]) -> None:
        """RedGate where one of them is red: no time is told of a wrong result."""
        self.gates += gates
        red = [
            f"{g.case}: {g.name} is {_number(g.value, '.3g')}, limit {g.limit:.3g}" for g in gates if not g.passed
        ]
        if red:
            raise RedGate(f"the gate of correctness is red, so nothing was timed: {'; '.join(red)}")


def write_findings(
    command: str,
    run: Callable[[Findings], object],
    *,
    settings: Mapping[str, Any],
    device: torch.device,
    dtype: str,
    output: Path,
) -> BenchRecord:
    """Run a benchmark and write its record to `output`/bench.json. RedGate: see Findings.

    `run` fills the findings it is given. Ctrl-C leaves a record of what it had found, marked `interrupted`;
    KeyboardInterrupt where that was nothing.
    """
    started, created = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    findings = Findings()
    interrupted = _is_interrupted(run, findings)
    environment = collect_environment(device)
    record = BenchRecord(
        command=command,
        name=output.name,
        created=created,
        hardware=hardware_name(environment, device),
        device=str(device),
        dtype=dtype,
        num_threads=torch.get_num_threads(),
        settings=settings,
        environment=environment,
        memory_source=findings.memory_source or memory_source(device),
        gates=findings.gates,
        rows=findings.rows,
        aims=findings.aims,
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
    )
    write_bench(output, record)
    return record


def _is_interrupted(run: Callable[[Findings], object], findings: Findings) -> bool:
    try:
        run(findings)
    except KeyboardInterrupt:
        if not findings.rows:
            raise
        return True
    return False


def check_device(name: str) -> torch.device:
    """ValueError where this machine does not have the device."""
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"--device is {name!r}, but this machine shows {count} CUDA device(s); use --device cpu "
            "(bench gpu: --device cpu --small, tiny sizes)"
        )
    return device


def check_implementation(name: str, device: torch.device) -> None:
    """ValueError where this machine cannot run the op's implementation of this name."""
    try:
        choose_implementation(name, torch.empty(0, device=device))
    except ValueError as error:
        raise ValueError(f"--implementation is {name!r}: {error}") from None


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """The folder's full path, made and tried out; folders made for it go again if nothing was written there.

    ValueError where it cannot be written to: before minutes are spent on what could not be kept.
    """
    folder = folder.resolve()
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    probe = folder / f".{FILE_NAME}.probe"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"\n")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"--output is {folder}, which is no folder to write to: {error}") from None
        yield folder
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # it holds something, or was never made
                each.rmdir()


def hardware_name(environment: Mapping[str, Any], device: torch.device) -> str:
    """The GPU, or the processor and the threads used of it."""
    if device.type == "cuda":
        return str(environment["cuda"]["devices"][device.index or 0]["name"])
    return f"{environment['cpu']['model'] or 'unknown CPU'}, {torch.get_num_threads()} threads"


def print_rows(record: BenchRecord, console: Console) -> None:
    """One row per case and side, then the gates in one line."""
    bases = [base for base in BASES if any(base in row.ratios for row in record.rows)]
    figures = {key: shown for key, shown in FIGURES.items() if any(key in row.figures for row in record.rows)}
    title = f"{record.command}: {record.hardware}, {record.dtype}{', interrupted' if record.interrupted else ''}"
    table = Table(title=title, title_justify="left")
    for heading in ("case", "side"):
        table.add_column(heading)
    headings = [*(f"× {base}" for base in bases), *(shown.heading for shown in figures.values())]
    for heading in ("median ms", "p10–p90 ms", "peak MiB", *headings):
        table.add_column(heading, justify="right")
    table.add_column("note")
    for row in record.rows:
        table.add_row(
            escape(row.case),
            row.side,
            _ms(row.median_ms),
            f"{_ms(row.p10_ms)}–{_ms(row.p90_ms)}",
            _number(None if row.peak_bytes is None else row.peak_bytes / MIB, ",.1f"),
            *(_number(row.ratios.get(base, {}).get("median"), ".3f") for base in bases),
            *(_figure(row, key, shown) for key, shown in figures.items()),
            escape(row.error or row.note or ""),
            style="red" if row.error else None,
        )
    console.print(table)
    green = sum(gate.passed for gate in record.gates)
    console.print(f"gates: {green} of {len(record.gates)} green", highlight=False)


def print_aims(record: BenchRecord, console: Console) -> None:
    """Each aim, what was measured, and whether it was reached."""
    table = Table(title=f"Aims: {record.hardware}, {record.dtype}", title_justify="left")
    for heading in ("case", "what"):
        table.add_column(heading)
    for heading in ("aim", "measured"):
        table.add_column(heading, justify="right")
    table.add_column("reached")
    table.add_column("note")
    for aim in record.aims:
        words = {True: "yes", False: "NO", None: "not measured"}
        table.add_row(
            escape(aim.case),
            escape(aim.what),
            f"{'≥' if aim.at_least else '≤'} {aim.limit:g}",
            _number(aim.value, ".3f"),
            words[aim.reached],
            escape(aim.note or ""),
            style=None if aim.reached else "red",
        )
    console.print(table)


def _figure(row: Row, key: str, shown: Figure) -> str:
    value = row.figures.get(key)
    return _number(None if value is None else value / shown.divisor, f",.{shown.digits}f")


def _ms(value: float | None) -> str:
    """Kernels take microseconds, steps seconds."""
    return _number(value, ".4f" if value is not None and value < 1 else ".2f")


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)
