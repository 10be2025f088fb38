"""`snell-scale bench merge | step | gpu`: parses, calls, prints."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from snell_scale.bench.settings import (
    GPU_ITEMS,
    LAYER_SIDES,
    STEP_SIDES,
    GpuSettings,
    MergeSettings,
    StepSettings,
    parse_shape,
)

if TYPE_CHECKING:
    from snell_scale.bench_records import BenchRecord

_S = TypeVar("_S", MergeSettings, StepSettings, GpuSettings)
_T = TypeVar("_T", MergeSettings, StepSettings)
_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True, help="Time the merge op and training steps, each behind a gate of correctness."
)

Sides = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated; default: all, with snell-mkl (ours by F.linear's library) where ours has another.",
        show_default=False,
    ),
]
Repeats = Annotated[int, typer.Option(min=3, help="Timed rounds; in each every side runs once.")]
Sparsity = Annotated[float, typer.Option(help="Share of entries of ΔW that are zero.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16, of weights and activations.")]
Implementation = Annotated[str, typer.Option(help="Of the merge op: auto, reference, torch or triton.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: as torch chooses.")]
Seed = Annotated[int, typer.Option(help="Of weights, factors and data.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder; default: runs/bench/<command>-<time>.", show_default=False)
]


@app.command()
def merge(
    *,
    shape: Annotated[
        list[str] | None, typer.Option(help="INxOUT; may be given again. Default: 768x768, 1280x5120.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1)] = 1576,
    rank: Annotated[int, typer.Option()] = 8,
    sparsity: Sparsity = 0.9,
    sides: Sides = None,
    repeats: Repeats = 15,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    implementation: Implementation = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """One linear layer, forward and backward, under every method."""
    settings = MergeSettings(
        sides=_names(sides, LAYER_SIDES),
        repeats=repeats,
        sparsity=sparsity,
        device=device,
        dtype=dtype,
        implementation=implementation,
        threads=threads,
        seed=seed,
        shapes=tuple(parse_shape(text) for text in shape or ("768x768", "1280x5120")),
        tokens=tokens,
        rank=rank,
    )
    from snell_scale.bench.merge import bench_merge

    _finish(_run("merge", _with_all_sides(settings, sides), bench_merge, output))


@app.command()
def step(
    *,
    model: Annotated[str, typer.Option(help="Any timm model, with random weights.")] = "vit_base_patch16_224",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    rank: Annotated[list[int] | None, typer.Option(help="May be given again. Default: 8.")] = None,
    sparsity: Sparsity = 0.9,
    sides: Sides = None,
    repeats: Repeats = 5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """A whole training step (forward, loss, backward, AdamW) of a timm model on synthetic images."""
    settings = StepSettings(
        sides=_names(sides, STEP_SIDES),
        repeats=repeats,
        sparsity=sparsity,
        device=device,
        dtype=dtype,
        threads=threads,
        seed=seed,
        model=model,
        batch_size=batch_size,
        ranks=tuple(rank or (8,)),
    )
    from snell_scale.bench.step import bench_step

    _finish(_run("step", _with_all_sides(settings, sides), bench_step, output))


@app.command()
def gpu(
    *,
    items: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(GPU_ITEMS)}.")] = ",".join(
        GPU_ITEMS
    ),
    small: Annotated[
        bool, typer.Option("--small", help="Tiny sizes, to try the command where no GPU is.")
    ] = False,
    device: Annotated[str, typer.Option(help="cuda or cuda:N; cpu with --small.")] = "cuda",
    implementation: Implementation = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """The whole set for a GPU, against its aims, in less than 8 minutes. Exit code 1 where an item failed."""
    settings = GpuSettings(
        items=_names(items, GPU_ITEMS),
        small=small,
        device=device,
        implementation=implementation,
        threads=threads,
        seed=seed,
    )
    from snell_scale.bench.gpu import bench_gpu
    from snell_scale.bench.report import print_aims

    record = _run("gpu", settings, bench_gpu, output)
    print_aims(record, _console())
    _finish(record)


def _run(command: str, settings: _S, bench: Callable[..., object], output: Path | None) -> "BenchRecord":
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
    print(f"Record: {folder}/bench.json")
    return record


def _with_all_sides(settings: _T, sides: str | None) -> _T:
    """Checked; with the side that depends on this machine's libraries, where the user named none."""
    settings.check_all()
    if sides is not None:
        return settings
    from snell_scale.bench.cpu_libraries import with_default_sides

    return with_default_sides(settings)


def _finish(record: "BenchRecord") -> None:
    """Exit code 130 where the user stopped it, 1 where something could not be measured."""
    sys.exit(_INTERRUPTED if record.interrupted else 1 if any(row.error for row in record.rows) else 0)


def _console() -> Console:
    # Wide where nobody watches: a log must not lose the end of a line.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
