"""One self-contained report.html, its pictures and tables. `python -m analysis.report RUNS… --output DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.drawing import Picture, styles_of, write_png
from analysis.figures import Styles, accuracy_against_memory, memory_by_category, training_curves
from analysis.groups import choice_of, metric_of, with_labels
from analysis.load import load_curves, load_runs
from analysis.page import Section, bullets, figure, page, paragraph
from analysis.samples import samples_section
from analysis.sections import comparison_table, environment_table, lead, runs_table
from analysis.summary import protocol_sentence, sentences, source_sentences
from analysis.tables import SPREAD, columns, comparison, print_table, write_tables
from snell_scale import metrics


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
    """Write report.html, table.md/.csv/.tex and the pictures as PNG to `output`; print the table.

    ValueError: no runs in `paths`, or runs of different metrics.
    """
    runs = load_runs(paths)
    metric = metric_of(runs)
    table = comparison(runs)
    shown = columns(table, metric)
    styles = styles_of(table)
    pictures = _pictures(runs, table, metric, styles)
    write_tables(table, shown, output)
    for picture, _ in pictures:
        write_png(picture, output)
    compared = runs.loc[runs["compared"]]
    told = [*sentences(table, runs), *source_sentences(compared), protocol_sentence(compared)]
    figures = "".join(figure(picture, caption) for picture, caption in pictures)
    sections = [
        Section("summary", "Summary", paragraph(told[0], kind="finding") + bullets(told[1:])),
        Section("comparison", "Comparison", comparison_table(table, shown, styles)),
        Section("pictures", "Pictures", f'<div class="figures">{figures}</div>'),
        *samples_section(runs),
        Section("runs", "Every run", runs_table(runs)),
        Section("environment", "Environment", environment_table(runs)),
    ]
    path = output / "report.html"
    path.write_text(page(title, lead(runs) + (paragraph(note, kind="note") if note else ""), sections), "utf-8")
    print_table(table, shown, title=f"{title}: {SPREAD}")
    print("\n".join(f"- {sentence}" for sentence in told) + "\n")
    return path


def _pictures(runs: pd.DataFrame, table: pd.DataFrame, metric: str, styles: Styles) -> list[tuple[Picture, str]]:
    """Every picture there are data for, with its caption."""
    labelled = with_labels(runs.loc[runs["compared"]])
    ok = labelled.loc[labelled["status"] == "ok"]
    curves = load_curves(ok).merge(ok[["folder", "label"]], on="folder")
    curves["order"] = curves["folder"].map({folder: index for index, folder in enumerate(ok["folder"])})
    curves = curves.sort_values(["order", "step"], kind="stable")
    better = "Up" if metrics.metric(metric).higher_is_better else "Down"
    sources = ", ".join(sorted(set(runs["memory_source"].dropna())))
    measured = f" Memory as counted from {sources}." if sources else ""
    drawn = (
        (
            accuracy_against_memory(table, metric, styles),
            f"{better} and to the left is better; bars: {SPREAD}.{measured}",
        ),
        (
            memory_by_category(table),
            f"What stands in memory at the peak of a training step, mean over seeds.{measured}",
        ),
        (
            training_curves(curves, choice_of(runs), styles),
            "Mean over seeds; the bands are ± one standard deviation.",
        ),
    )
    return [(picture, caption) for picture, caption in drawn if picture is not None]


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
