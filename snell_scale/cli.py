"""The command line: run, compare, sweep, watch, bench, list, schema and merge. Parses, calls, prints."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snell_scale import registry
from snell_scale.bench.cli import app as bench_app
from snell_scale.config import Config, json_schema, load_config, to_dict
from snell_scale.estimate.command import estimate
from snell_scale.exit_codes import EXIT_CODES, REFUSED, OtherRankFailed, tell_launcher
from snell_scale.records import Result
from snell_scale.results_table import console, print_results, say
from snell_scale.sweep.command import sweep
from snell_scale.watch.command import watch

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune large vision models with little memory, and compare the ways to do it.",
)
app.add_typer(bench_app, name="bench")
app.command()(sweep)
app.command()(watch)
app.command()(estimate)

ConfigPath = Annotated[Path, typer.Argument(help="A YAML config; `snell-scale schema` describes its keys.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, e.g. training.lr=1e-3 method.name=lora", show_default=False),
]


def main() -> None:
    """Entry point: user errors become one message and exit code 2 instead of a traceback."""
    try:
        app(args=_spread_lists(sys.argv[1:]))
    except (ValueError, OSError) as error:
        if os.environ.get("SNELL_SCALE_TRACEBACK"):
            raise
        who = f"rank {os.environ['RANK']} " if os.environ.get("RANK", "0") != "0" else ""
        text = f"[bold red]{who}error:[/] {escape(str(error))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        sys.exit(tell_launcher(REFUSED))
    except OtherRankFailed as error:
        print(f"rank {os.environ['RANK']} {error}", file=sys.stderr)
        sys.exit(tell_launcher(error.exit_code))


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    resume: Annotated[str, typer.Option(help="auto: continue an earlier attempt; never: refuse to.")] = "never",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of this name.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but train; write nothing.")] = False,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="In as few microbatches as the estimate says fit; the batch stays what it is."
        ),
    ] = False,
    device_memory: Annotated[
        str | None, typer.Option(help="With --fit: e.g. 20GiB; default: the device's, less a tenth.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
    varied: Annotated[str, typer.Option(hidden=True, help="JSON for the record: what a sweep varied.")] = "{}",
) -> None:
    """Train one config and record the run.

    Under torchrun or another launcher this is one rank of the run: set engine.name to ddp, fsdp2 or deepspeed.
    Exit code: 0 ok, 1 failed, 2 bad input or a full or unwritable disk, 3 out of memory, 4 diverged,
    75 interrupted (resumable: SIGTERM, SIGUSR2 and Ctrl-C save a checkpoint first).
    """
    if resume not in ("never", "auto"):
        raise ValueError(f"--resume is {resume!r}, expected auto or never")
    resolved = load_config(config, overrides or [], config_class=registry.config_class)
    if dry_run and fit:
        raise ValueError("--dry-run does not fit: ask `snell-scale estimate` what --fit would choose")
    if dry_run:
        _dry_run(resolved)
        return
    if device_memory is not None and not fit:
        raise ValueError("--device-memory belongs to --fit: give both, or ask `snell-scale estimate`")
    from snell_scale.run import run as run_config

    if fit:
        run_config = _fitted(device_memory)
    result = run_config(
        resolved,
        resume="auto" if resume == "auto" else "never",
        overwrite=overwrite,
        varied=json.loads(varied),
        quiet=quiet,
    )
    if os.environ.get("RANK", "0") == "0":
        print_results([result])
        say(f"Record: {Path(resolved.output_dir) / resolved.name}/result.json")
    sys.exit(tell_launcher(EXIT_CODES[result.status]))


@app.command()
def compare(
    configs: Annotated[list[Path], typer.Argument(help="Configs to compare, or one study file with a grid.")],
    *,
    grid: Annotated[
        list[str] | None, typer.Option(help="key=value,value …; e.g. --grid methods=lora,snell seeds=0,1,2")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value for every run.")] = None,
    name: Annotated[str | None, typer.Option(help="Folder below output_dir; default: the files' names.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; each gets its share of the cores.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs; start none.")] = False,
) -> None:
    """Run every combination of a study; what is done is skipped, what was interrupted continues."""
    from snell_scale.compare import parse_grid, plan_study, run_study

    planned = plan_study(
        configs,
        grid=dict(parse_grid(text) for text in grid or []),
        overrides=settings or [],
        name=name,
        config_class=registry.config_class,
    )
    if dry_run:
        say("\n".join(f"{p.config.output_dir}/{p.config.name}" for p in planned))
        return
    from snell_scale.study_progress import StudyProgress

    try:
        with StudyProgress(len(planned)) as progress:
            results = run_study(planned, num_jobs=jobs, finished=progress.finished)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(EXIT_CODES["interrupted"])
    print_results(results)
    folder = (Path(planned[0].config.output_dir) / planned[0].config.name).parent
    say(f"Records: {folder}. Report: python -m analysis.report {folder} --output {folder}")
    sys.exit(max(EXIT_CODES[result.status] for result in results))


@app.command("list")
def list_components(
    kind: Annotated[str, typer.Argument(help="models, methods, tasks, datasets or engines")],
    *,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="Of models: what each method trains of well-known ones, as Markdown.")
    ] = False,
) -> None:
    """What there is to choose from."""
    kinds = {"models": "model", "methods": "method", "tasks": "task", "datasets": "data", "engines": "engine"}
    if kind not in kinds:
        raise ValueError(f"cannot list {kind!r}, {registry.nearest(kind, list(kinds))}")
    if sizes:
        _print_sizes(kind)
        return
    table = Table("name", "what it is")
    for name in registry.names(kinds[kind]):
        doc = registry.config_class(kinds[kind], name).__doc__ or ""
        table.add_row(name, " ".join(doc.split("\n\n")[0].split()))
    console.print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of a config, for editors to check and complete YAML with."""
    components = {
        kind: {name: registry.config_class(kind, name) for name in registry.names(kind)}
        for kind in registry.COMPONENTS
    }
    print(json.dumps(json_schema(components), indent=2))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="A run's adapter folder, or any PEFT adapter folder.")],
    *,
    base: Annotated[
        Path | None,
        typer.Option(help="The config whose model the adapter belongs to; default: the run's own."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Fold an adapter into its base model and write plain weights."""
    from snell_scale.merging import merge_adapter

    config_path = base or adapter.parent / "config.yaml"
    if not config_path.is_file():
        raise ValueError(f"no config at {config_path}: name the base model's config with --base")
    config = load_config(config_path, config_class=registry.config_class)
    num_tensors, num_bytes = merge_adapter(config, adapter, output, overwrite=overwrite)
    say(f"Wrote {output}: {num_tensors} tensors, {num_bytes / 2**20:.1f} MiB")


def _fitted(device_memory: str | None) -> Callable[..., Result]:
    """`run`, in microbatches that fit."""
    from snell_scale.estimate.byte_sizes import parse_size
    from snell_scale.estimate.fit import run_fitted
    from snell_scale.estimate.settings import HEADROOM
    from snell_scale.run import run as run_config

    limit = None if device_memory is None else int((1 - HEADROOM) * parse_size(device_memory))
    tell = say if os.environ.get("RANK", "0") == "0" else lambda _: None
    return partial(run_fitted, run=run_config, limit_bytes=limit, say=tell)


def _print_sizes(kind: str) -> None:
    if kind != "models":
        raise ValueError(f"--sizes is of models, got {kind!r}: `snell-scale list models --sizes`")
    from snell_scale.models.census import census_markdown, census_rows

    print(census_markdown(census_rows()))


def _dry_run(config: Config) -> None:
    """Resolve, build, count and check the data; print what a run would train."""
    import yaml

    from snell_scale.assembly import assemble
    from snell_scale.training import total_steps

    parts = assemble(config)
    say(yaml.safe_dump(to_dict(config), sort_keys=False))
    table = Table("what", "value", title="Dry run: nothing was trained or written")
    sizes = ", ".join(f"{split} {size}" for split, size in parts.data.sizes.items())
    share = 100 * parts.num_trainable_params / parts.num_total_params
    table.add_row("samples", f"{sizes}; {len(parts.data.class_names)} classes")
    table.add_row("optimizer steps", f"{total_steps(config, parts.data):,}")
    table.add_row("parameters of the base model", f"{parts.num_total_params:,}")
    table.add_row("trainable parameters", f"{parts.num_trainable_params:,} ({share:.2f} %)")
    console.print(table)


def _spread_lists(arguments: list[str]) -> list[str]:
    """`--grid a=1,2 b=3` → `--grid a=1,2 --grid b=3`; likewise --set and --matrix."""
    spread: list[str] = []
    option = ""
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if name in ("--grid", "--set", "--matrix"):
            option = name
            spread += [name, value] if sign else [name]
        elif option and sign and not argument.startswith("-"):
            spread += [argument] if spread[-1] == option else [option, argument]
        else:
            option = ""
            spread.append(argument)
    return spread


if __name__ == "__main__":
    main()
