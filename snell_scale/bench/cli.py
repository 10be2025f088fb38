"""`snell-scale bench merge | step | loop | engines | gpu`: parses, calls, prints."""

from pathlib import Path
from typing import Annotated

import typer

from snell_scale.bench.command import finish, run_bench, with_all_sides
from snell_scale.bench.settings import (
    ENGINES,
    GPU_ITEMS,
    LAYER_SIDES,
    METHODS,
    STEP_SIDES,
    EnginesSettings,
    GpuSettings,
    LoopSettings,
    MergeSettings,
    StepSettings,
    parse_numbers,
    parse_shape,
)

app = typer.Typer(
    no_args_is_help=True,
    help="Time the merge op, training steps, the loop and the engines, each behind a gate of correctness.",
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
Model = Annotated[str, typer.Option(help="Any timm model, with random weights.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images of a step.")]
Method = Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")]
Rank = Annotated[int, typer.Option(help="Of the method, where it has one.")]
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

    finish(run_bench("merge", with_all_sides(settings, sides), bench_merge, output))


@app.command()
def step(
    *,
    model: Model = "vit_base_patch16_224",
    batch_size: BatchSize = 8,
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

    finish(run_bench("step", with_all_sides(settings, sides), bench_step, output))


@app.command()
def loop(
    *,
    model: Annotated[
        str, typer.Option(help="A timm vision transformer (vit_…, deit_…).")
    ] = "vit_base_patch16_224",
    batch_size: BatchSize = 8,
    method: Method = "lora",
    rank: Rank = 8,
    sparsity: Sparsity = 0.9,
    steps: Annotated[int, typer.Option(min=1, help="Of each loop in a round; one of them is logged.")] = 2,
    repeats: Repeats = 10,
    device: Device = "cpu",
    threads: Threads = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """What the training loop costs beside model, loss and optimizer: `run`'s own loop against a bare one.

    Both train the same model on the same synthetic images and take turns of --steps steps. A thin copy of the
    model (as many layers, the same images, hardly any arithmetic) shows the loop's own milliseconds; they are
    told as a share of the model's step, beside the two loops' times with the model itself. Nothing is timed
    unless both end the first steps with the same loss and the same weights.
    """
    settings = LoopSettings(
        model=model,
        batch_size=batch_size,
        method=method,
        rank=rank,
        sparsity=sparsity,
        steps=steps,
        repeats=repeats,
        device=device,
        threads=threads,
        seed=seed,
    )
    settings.check_all()
    from snell_scale.bench.loop import bench_loop

    finish(run_bench("loop", settings, bench_loop, output))


@app.command()
def engines(
    *,
    engines: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(ENGINES),
    processes: Annotated[str, typer.Option(help="Numbers of processes, comma-separated.")] = "1,2",
    model: Model = "vit_small_patch16_224",
    depth: Annotated[int, typer.Option(min=0, help="Blocks of the model; 0: as many as it has.")] = 4,
    image_size: Annotated[int, typer.Option(min=8, help="Pixels a side.")] = 64,
    batch_size: BatchSize = 16,
    method: Method = "snell",
    rank: Rank = 8,
    sparsity: Sparsity = 0.9,
    steps: Annotated[int, typer.Option(min=8, help="Of each run; the first 5 are not timed.")] = 15,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each every engine runs once.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, or cuda: a GPU for each process.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads, shared by a run's processes; default: as torch chooses."),
    ] = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Step time, memory and bytes communicated of every engine on 1 and 2 processes of this machine.

    Each cell is an ordinary `snell-scale run` on enlarged handwritten digits, under torchrun where it has several
    processes, with the same images in a step whatever their number; the cells take turns. An engine that cannot
    run here has a row that says why, and the exit code is 1. One whose loss is not the others' has no time.
    Payload and wire: bytes of one step's collectives, as result.json tells them; gradients: 4 bytes for each
    trained number, what a plain data-parallel step must exchange.
    """
    settings = EnginesSettings(
        engines=_names(engines, ()),
        processes=parse_numbers("--processes", processes),
        model=model,
        depth=depth or None,
        image_size=image_size,
        batch_size=batch_size,
        method=method,
        rank=rank,
        sparsity=sparsity,
        steps=steps,
        repeats=repeats,
        device=device,
        threads=threads,
        seed=seed,
    )
    settings.check_all()
    from snell_scale.bench.engines import bench_engines

    finish(run_bench("engines", settings, bench_engines, output))


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

    finish(run_bench("gpu", settings, bench_gpu, output))


def _names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
