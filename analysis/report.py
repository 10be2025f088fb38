"""One self-contained report.html, its pictures and tables. `python -m analysis.report RUNS… --output DIR`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from analysis.drawing import Picture, styles_of, write_pdf, write_png
from analysis.figures import Styles, accuracy_against_memory, memory_by_category, training_curves
from analysis.groups import choice_of, metric_of, with_labels
from analysis.load import load_curves, load_environments, load_runs
from analysis.report_page.explore import explore_section
from analysis.report_page.methods import methods_section
from analysis.report_page.page import Section, bullets, figure, page, paragraph
from analysis.report_page.plot_data import colors_of, plot_data
from analysis.report_page.samples import samples_section
from analysis.report_page.scale import scale_section
from analysis.report_page.sections import comparison_table, environment_section, lead
from analysis.report_page.summary import protocol_sentence, sentences, source_sentences
from analysis.tables import SPREAD, columns, comparison, print_table, write_tables
from analysis.updates.allocation import allocation_heat_map
from analysis.updates.delta_ranks import delta_ranks, rank_picture

_MOST_PRINTED = 40  # rows that one printed picture holds


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write, print; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        path = write_report(options.runs, options.output, title=options.title, note=options.note)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"The report is {path}")
    return 0


def write_report(paths: Sequence[Path], output: Path, *, title: str, note: str | None = None) -> Path:
    """Write report.html, table.md/.csv/.tex and the pictures as PNG and PDF to `output`; print the table.

    ValueError: no runs in `paths`, or runs of different metrics.
    """
    runs = load_runs(paths)
    metric = metric_of(runs)
    table = comparison(runs)
    shown = columns(table, metric, with_score=not table["predicted"].all())
    styles, curves = styles_of(table), load_curves(_ended_well(runs))
    pictures, of_layers = _pictures(runs, table, curves, styles), _pictures_of_layers(runs)
    write_tables(table, shown, output)
    told = _told(runs, table)
    environments = load_environments(runs.loc[~runs["predicted"]])
    data = plot_data(runs, curves, styles)
    colors = colors_of(data)
    sections = [
        Section("summary", "Summary", paragraph(told[0], kind="finding") + bullets(told[1:])),
        Section("comparison", "Comparison", comparison_table(table, shown, colors)),
        *methods_section(runs, styles, colors, most_drawn=_MOST_PRINTED),
        explore_section(runs, environments, data, pictures),
        *scale_section(runs, most_drawn=_MOST_PRINTED),
        *_layers_section(of_layers),
        *samples_section(runs),
        *environment_section(environments, num_runs=len(runs)),
    ]
    of_sections = [picture for section in sections for picture in section.pictures]
    _write_pictures([*pictures.values(), *of_layers, *of_sections], output)
    path = output / "report.html"
    head = lead(runs) + (paragraph(note, kind="note") if note else "")
    path.write_text(page(title, head, sections, data=data), "utf-8")
    print_table(table, shown, title=f"{title}: {SPREAD}")
    print("\n".join(f"- {sentence}" for sentence in told) + "\n")
    return path


def _write_pictures(pictures: Sequence[Picture], output: Path) -> None:
    for picture in pictures:
        write_png(picture, output)
        write_pdf(picture, output)


def _told(runs: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    compared = runs.loc[runs["compared"]]
    told = [*sentences(table, runs), *source_sentences(compared)]
    if table["label"].nunique() > _MOST_PRINTED:
        told.append(
            f"There are pictures in files of {_MOST_PRINTED} rows at most, and not of these {len(table)}: "
            "for them, make a report of fewer runs."
        )
    return (
        told if compared["predicted"].all() else [*told, protocol_sentence(compared.loc[~compared["predicted"]])]
    )


def _ended_well(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.loc[runs["compared"] & (runs["status"] == "ok") & ~runs["predicted"]]


def _pictures(
    runs: pd.DataFrame, table: pd.DataFrame, curves: pd.DataFrame, styles: Styles
) -> dict[str, Picture]:
    """Every picture there are data for, by the kind of plot that it stands for on the page."""
    if table["label"].nunique() > _MOST_PRINTED:
        return {}
    labelled = with_labels(runs.loc[runs["compared"]])
    ok = _ended_well(labelled)
    lines = curves.merge(ok[["folder", "label"]], on="folder")
    lines["order"] = lines["folder"].map({folder: index for index, folder in enumerate(ok["folder"])})
    lines = lines.sort_values(["order", "step"], kind="stable")
    drawn = {
        "scatter": accuracy_against_memory(table, metric_of(runs), styles),
        "bars": memory_by_category(table),
        "curves": training_curves(lines, choice_of(runs), styles),
    }
    return {kind: picture for kind, picture in drawn.items() if picture is not None}


def _pictures_of_layers(runs: pd.DataFrame) -> dict[Picture, str]:
    """What the methods did to each layer, with captions; each only where runs have written what it needs."""
    ran = runs.loc[~runs["predicted"]]
    found: dict[Picture | None, str] = {allocation_heat_map(ran): "The first seed of each variant of SNELLA."}
    if with_labels(ran.loc[ran["compared"]])["label"].nunique() <= _MOST_PRINTED:
        ranks = delta_ranks(ran)
        found[rank_picture(ranks, ran)] = " ".join(ranks.notes)
    return {picture: caption for picture, caption in found.items() if picture is not None}


def _layers_section(pictures: Mapping[Picture, str]) -> list[Section]:
    figures = "".join(figure(picture, caption) for picture, caption in pictures.items())
    return [Section("layers", "Layers", f'<div class="figures">{figures}</div>')] if figures else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders at any depth above them"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--title", default="Fine-tuning methods compared", help="heading of the report")
    parser.add_argument("--note", help="a remark on the data, shown under the title")
    return parser


if __name__ == "__main__":
    sys.exit(main())
