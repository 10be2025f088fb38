"""`snell-scale estimate`: parses, calls, prints."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from snell_scale import registry
from snell_scale.compare import is_study, parse_grid
from snell_scale.config import Config, load_config
from snell_scale.estimate.byte_sizes import parse_size, show_size
from snell_scale.estimate.settings import HEADROOM, Settings, Target
from snell_scale.exit_codes import EXIT_CODES
from snell_scale.records import MEMORY_CATEGORIES
from snell_scale.results_table import console, print_results, say

if TYPE_CHECKING:  # torch and the models are imported when something is estimated
    from snell_scale.estimate.prediction import Estimator, Prediction

_OUTPUT = Path("runs/estimates")


ConfigPath = Annotated[Path, typer.Argument(help="A YAML config, or a study, whose runs are all estimated.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. training.batch_size=64", show_default=False)
]
WorldSize = Annotated[int, typer.Option(min=1, help="Ranks (GPUs) of the run.")]
Engine = Annotated[str | None, typer.Option(help="Short for engine.name=….", show_default=False)]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="Of one device, e.g. 80GiB: says whether the run fits, and how large a microbatch."),
]
Headroom = Annotated[
    float,
    typer.Option(min=0, max=0.9, help="Share of --device-memory left for context, workspaces, fragmentation."),
]
Microbatch = Annotated[
    int | None, typer.Option(min=1, help="Samples of one forward on one rank, whatever the config's batch.")
]
NumClasses = Annotated[
    int | None, typer.Option(min=1, help="Of the data; then no data are read.", show_default=False)
]
OfTarget = Annotated[
    Target | None,
    typer.Option("--target", help="Whose kernels. Default: cuda, but for engine.device=cpu.", show_default=False),
]
Matrix = Annotated[
    list[str] | None,
    typer.Option(
        help="key=value,value …: every combination; e.g. --matrix methods=lora,snell engines=ddp,fsdp2 "
        "world_size=8,64; also models=, the architectures."
    ),
]
Output = Annotated[
    Path | None, typer.Option(help=f"Folder for records; of a --matrix by default {_OUTPUT}.", show_default=False)
]
Jobs = Annotated[int, typer.Option(min=1, help="Estimates of a --matrix at a time.")]


def estimate(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    world_size: WorldSize = 1,
    engine: Engine = None,
    device_memory: DeviceMemory = None,
    headroom: Headroom = HEADROOM,
    microbatch: Microbatch = None,
    num_classes: NumClasses = None,
    target: OfTarget = None,
    matrix: Matrix = None,
    output: Output = None,
    jobs: Jobs = 1,
) -> None:
    """Predict the peak memory of a run without its weights, its data or its GPUs.

    The true training step runs on tensors that have a shape and no memory: forward, backward, optimizer,
    activation checkpointing, the merge op. FSDP2 is sharded by its own code over ranks that are not there, DDP's
    buckets are tensors; DeepSpeed's shares are arithmetic on what trains and what is frozen. The batch is the
    config's, of all ranks together, unless --microbatch says how much each of them takes. Exit code: 0, or 3
    where the run does not fit into --device-memory; 0 of a study or a --matrix, whose table says what fits.
    """
    given = [*(overrides or []), *([f"engine.name={engine}"] if engine else [])]
    limit = None if device_memory is None else int((1 - headroom) * parse_size(device_memory))
    settings = Settings(num_classes, target, microbatch, limit)
    if matrix or is_study(config):
        _matrix(config, given, matrix or [], world_size, settings, output or _OUTPUT, jobs)
        return
    resolved = load_config(config, given, config_class=registry.config_class)
    sys.exit(_one(resolved, world_size, settings, output))


def _one(config: Config, world_size: int, settings: Settings, output: Path | None) -> int:
    from snell_scale.estimate.prediction import Estimator, microbatch_of
    from snell_scale.estimate.record import as_result, describe, write_estimate

    microbatch = settings.microbatch_size or microbatch_of(config, world_size)
    with Estimator(config, world_size, settings.num_classes, settings.target) as estimator:
        prediction = estimator.predict(microbatch)
        _print(prediction)
        result = as_result(prediction, config, varied={}, limit_bytes=settings.limit_bytes)
        say(describe(prediction, settings.limit_bytes))
        if settings.limit_bytes is not None:
            _say_what_fits(estimator, prediction, settings.limit_bytes)
    if output is not None:
        placed = config.model_copy(update={"output_dir": str(output)})
        say(f"Record: {write_estimate(result, placed)}/result.json")
    return EXIT_CODES[result.status]


def _print(prediction: "Prediction") -> None:
    """Phases × categories, without what is nowhere."""
    phases = prediction.memory["phases"]
    shown = [c for c in MEMORY_CATEGORIES if any(entry[f"{c}_bytes"] for entry in phases.values())]
    ranks = f", one of {prediction.world_size} ranks" if prediction.world_size > 1 else ""
    title = f"Estimated MiB: microbatch of {prediction.microbatch_size}{ranks}, kernels of {prediction.target}"
    table = Table("phase", "total", *shown, title=title, title_justify="left")
    for phase, entry in phases.items():
        mark = " (peak)" if phase == prediction.memory["peak"]["phase"] else ""
        sizes = (entry[f"{name}_bytes"] / 2**20 for name in ("total", *shown))
        table.add_row(phase + mark, *(f"{size:,.1f}" for size in sizes))
    console.print(table)
    share = 100 * prediction.num_trainable_params / prediction.num_total_params
    say(
        f"{prediction.num_total_params:,} parameters, {prediction.num_trainable_params:,} trained "
        f"({share:.2f} %); estimated in {prediction.seconds:.1f} s"
    )


def _say_what_fits(estimator: "Estimator", prediction: "Prediction", limit_bytes: int) -> None:
    """The largest microbatch; where evaluation does not fit, that too, which no microbatch would change."""
    from snell_scale.estimate.fitting import MOST_SAMPLES, largest_fitting, ways_to_need_less

    largest = largest_fitting(lambda size: estimator.predict(size).peak_bytes, limit_bytes)
    room, config = show_size(limit_bytes), estimator.config
    of_what = ""
    if prediction.evaluation_bytes > limit_bytes:
        of_what = " of the training step"
        say(f"An evaluation batch of {config.evaluation.batch_size} does not fit: lower evaluation.batch_size")
    if largest == 0:
        say(f"Not even a microbatch of 1 fits into {room}: {ways_to_need_less(config)}")
        return
    more = " or more" if largest == MOST_SAMPLES else ""
    say(f"The largest microbatch{of_what} that fits into {room}: {largest}{more} on each rank")


def _matrix(
    config: Path,
    overrides: Sequence[str],
    matrix: Sequence[str],
    world_size: int,
    settings: Settings,
    output: Path,
    jobs: int,
) -> None:
    from snell_scale.estimate.matrix import plan_matrix, run_matrix
    from snell_scale.study_progress import StudyProgress

    grid = {"world_size": [world_size], **dict(parse_grid(text) for text in matrix)}
    cells = plan_matrix(
        [config],
        grid=grid,
        overrides=[*overrides, f"output_dir={output}"],
        name=config.stem,
        settings=settings,
        config_class=registry.config_class,
    )
    with StudyProgress(len(cells)) as progress:
        results, refused = run_matrix(cells, num_jobs=jobs, finished=progress.finished)
    print_results(results)
    for reason in refused:
        say(f"refused: {reason}")
    say(f"Records: {output}/{config.stem}. Report: python -m analysis.memory_scaling {output} --output {output}")
