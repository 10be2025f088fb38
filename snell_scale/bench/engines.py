"""`snell-scale bench engines`: step time, memory and communication of ordinary runs, by engine and processes."""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from snell_scale import registry
from snell_scale.assembly import assemble
from snell_scale.bench.engine_runs import finished_run
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.report import Findings
from snell_scale.bench.settings import ENGINES, EnginesSettings, method_settings
from snell_scale.bench.timing import Timings, check_not_interrupted, rows_of
from snell_scale.bench.workloads import TARGETS
from snell_scale.bench_records import Gate, Row
from snell_scale.config import Config, resolve
from snell_scale.records import Result, read_steps

# Sums in another order part the losses by 1e-6; an entry of SNELL's that then falls on the other side of its
# threshold moves one ΔW by 1e-3 of its size. A wrong mean over two ranks, or half a batch, moves losses by 1e-2.
_LOSS_LIMIT = 1e-3
_LR = 1e-3
_WARMUP_STEPS, _MEASURED_STEP = 5, 3
_BYTES_OF_A_GRADIENT = 4
# Two classes, nearly all of them to train on: what is evaluated at a run's end is small.
_TRAIN_PER_CLASS, _VALIDATION_PER_CLASS = 170, 2


@dataclass
class _Cell:
    """One row: an engine on a number of processes, and what its runs gave so far."""

    engine: str
    processes: int
    config: Config
    losses: list[float] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    error: str | None = None

    @property
    def side(self) -> str:
        return self.engine if self.engine == "single" else f"{self.engine} x{self.processes}"

    def run(self, folder: Path, *, threads: int) -> None:
        """Once more; what goes wrong becomes the cell's error."""
        try:
            result = finished_run(self.config, self.processes, folder, threads=threads)
            self.losses = [line["loss"] for line in read_steps(folder / self.config.name) if "lr" in line]
            self.results.append(result)
        except ValueError as error:
            self.error = str(error)


def bench_engines(
    settings: EnginesSettings, progress: BenchProgress, findings: Findings | None = None
) -> Findings:
    """One row per cell; ValueError for what no run could do. The cells take turns, a whole run each time."""
    findings = Findings() if findings is None else findings
    findings.memory_source = "live tensors of the measured step, on the rank with the most (result.json)"
    cells = [_Cell(engine, n, _config(settings, engine, n)) for engine, n in settings.cells()]
    _check(settings, cells)
    interrupted, done = False, 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            for index in range(settings.repeats):
                for cell in _turned(_running(cells), index):
                    progress.say(f"round {index + 1} of {settings.repeats}: {cell.side}")
                    cell.run(Path(folder), threads=_threads(settings, cell.processes))
                done += 1
                _compare(cells, _case(settings), findings)
        except KeyboardInterrupt:
            if not done:
                raise
            interrupted = True
    findings.rows += _rows(_case(settings), cells, rounds=done, interrupted=interrupted)
    check_not_interrupted(Timings(interrupted=interrupted))
    return findings


def _case(settings: EnginesSettings) -> str:
    depth = "" if settings.depth is None else f" depth {settings.depth}"
    size = f"{settings.image_size}x{settings.image_size}"
    return f"{settings.model}{depth} {size} batch {settings.batch_size} {settings.method}"


def _check(settings: EnginesSettings, cells: Sequence[_Cell]) -> None:
    """Before any process starts: ValueError for what no cell could do, an error for the cell that cannot."""
    if settings.batch_size > 2 * _TRAIN_PER_CLASS:
        raise ValueError(f"--batch-size is {settings.batch_size}, of {2 * _TRAIN_PER_CLASS} images: lower it")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cuda" and max(settings.processes) > found:
        raise ValueError(
            f"--processes {max(settings.processes)} with --device cuda, which takes a GPU each: {found}"
        )
    assemble(_config(settings, "single", 1))
    for cell in cells:
        try:
            cell.config.engine.check()
        except ValueError as error:
            cell.error = str(error)


def _config(settings: EnginesSettings, engine: str, processes: int) -> Config:
    """A run of `steps` steps that evaluates once, at its end."""
    per_class = {"train_per_class": _TRAIN_PER_CLASS, "validation_per_class": _VALIDATION_PER_CLASS}
    arguments = {} if settings.depth is None else {"depth": settings.depth}
    raw = {
        "name": f"{engine}-{processes}",
        "seed": settings.seed,
        "model": {"name": "timm", "architecture": settings.model, "arguments": arguments},
        "data": {"name": "digits", "classes": [0, 1], "image_size": settings.image_size, **per_class},
        "task": {"name": "classification"},
        "method": method_settings(settings.method, settings.rank, sparsity=settings.sparsity, targets=TARGETS),
        "engine": {**ENGINES[engine], "device": settings.device, "cpu_threads": _threads(settings, processes)},
        "training": {
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "lr": _LR,
            "weight_decay": 1e-2,
        },
        "evaluation": {"every_steps": settings.steps, "batch_size": settings.batch_size},
        "logging": {"every_steps": 1, "memory_at_step": _MEASURED_STEP, "warmup_steps": _WARMUP_STEPS},
    }
    return resolve(raw, [], config_class=registry.config_class, source="bench engines")


def _threads(settings: EnginesSettings, processes: int) -> int:
    """Of each process: whatever their number, they share the same cores."""
    return max(1, (settings.threads or torch.get_num_threads()) // processes)


def _running(cells: Sequence[_Cell]) -> list[_Cell]:
    return [cell for cell in cells if cell.error is None]


def _turned(cells: list[_Cell], by: int) -> list[_Cell]:
    return [*cells[by % len(cells) :], *cells[: by % len(cells)]] if cells else []


def _compare(cells: Sequence[_Cell], case: str, findings: Findings) -> None:
    """Every step's loss against that of the first cell that ran. Who has others is out: no time is told of it."""
    running = _running(cells)
    for cell in running[1:]:
        pairs = zip(cell.losses, running[0].losses, strict=True)
        apart = max(abs(ours - expected) for ours, expected in pairs) / running[0].losses[0]
        name = f"{cell.side}: largest difference of a step's loss to {running[0].side}'s, over the first loss"
        gate = Gate(case, name, apart, _LOSS_LIMIT)
        findings.gates = [*(known for known in findings.gates if known.name != name), gate]
        if not gate.passed:
            cell.error = f"trains otherwise than {running[0].side}: losses differ by {apart:.2g}"


def _rows(case: str, cells: Sequence[_Cell], *, rounds: int, interrupted: bool) -> list[Row]:
    timings = Timings(
        {cell.side: [_step_ms(result) for result in cell.results[:rounds]] for cell in _running(cells)},
        {cell.side: cell.error for cell in cells if cell.error is not None},
        interrupted,
    )
    by_side = {cell.side: cell for cell in cells}
    peaks = {side: by_side[side].results[0].memory for side in timings.milliseconds}
    rows = rows_of(
        case, timings, peaks={side: memory["peak"]["total_bytes"] for side, memory in peaks.items() if memory}
    )
    in_order = {row.side: row for row in rows}
    return [
        in_order[cell.side]
        if cell.error
        else replace(in_order[cell.side], figures=_figures(cell.results[:rounds]))
        for cell in cells
    ]


def _step_ms(result: Result) -> float:
    value = result.throughput["step_ms_median"]
    assert value is not None
    return value


def _figures(results: Sequence[Result]) -> dict[str, float]:
    first = results[0]
    rates = [rate for rate in (result.throughput["images_per_s"] for result in results) if rate is not None]
    communication: Mapping[str, Any] = first.communication or {}
    figures = {
        "processes": first.world_size,
        "images_per_s": statistics.median(rates),
        "gradient_bytes": _BYTES_OF_A_GRADIENT * (first.num_trainable_params or 0),
    }
    return figures | {
        key: communication[key] for key in ("payload_bytes", "wire_bytes_per_rank") if key in communication
    }
