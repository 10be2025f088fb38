"""The comparison of methods: mean ± standard deviation over seeds, as Markdown, CSV, LaTeX and on a terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from analysis.groups import SETTINGS, capitalized, metric_name, others_of, varied_keys, with_labels
from analysis.load import Row, rows_of
from snell_scale.records import MEMORY_CATEGORIES, STATUSES

SPREAD = "mean ± sample standard deviation over n seeds"
PEAKS = tuple(f"peak_{category}_mib" for category in MEMORY_CATEGORIES)
_MEANS = ("validation_score", "trainable_percent", "peak_total_mib", *PEAKS, "images_per_s", "adapter_kib")
_LATEX: dict[str, str] = {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "~": r"\textasciitilde{}"}
_LATEX |= {"<": "$<$", ">": "$>$", "|": "$|$", "→": r"$\to$", "×": r"$\times$"}  # as they are not in OT1
_LATEX |= {"^": r"\textasciicircum{}"} | {character: f"\\{character}" for character in "&%$#_{}"}


@dataclass(frozen=True)
class Column:
    """One column as it is shown: `text` writes a row's cell, `key` is the column that sorts it."""

    heading: str
    key: str
    text: Callable[[Row], str]
    is_number: bool = True


def comparison(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per label, status and source, in numbers: what did not end "ok", or was predicted, has its own.

    Of several runs of one seed the mean stands for it: copies of a run are no further seeds.
    Columns: label, method, status, predicted, n, seeds, score_mean, score_std (sample standard deviation, NaN for
    one run), the same of each further reported metric as test_<metric>_mean and _std, the means of the other
    figures, the metric that chose the weights, the settings, and the varied keys.
    """
    runs = runs.loc[runs["compared"]]
    labelled = with_labels(runs)
    keys, others = varied_keys(runs), [f"test_{name}" for name in others_of(runs) if f"test_{name}" in runs]
    rows = []
    for label in labelled["label"].unique():
        same = labelled.loc[labelled["label"] == label]
        kinds = {
            (bool(predicted), status) for predicted, status in zip(same["predicted"], same["status"], strict=True)
        }
        for predicted, status in sorted(kinds, key=lambda kind: (kind[0], STATUSES.index(kind[1]))):
            group = same.loc[(same["status"] == status) & (same["predicted"] == predicted)]
            of_seeds = group.set_index("seed")[["score", *others, *_MEANS]].astype(float).groupby("seed").mean()
            row = {
                "label": label,
                "method": group["method"].iloc[0],
                "status": status,
                "predicted": predicted,
                "n": len(of_seeds),
                "seeds": " ".join(str(seed) for seed in of_seeds.index),
                "score_mean": of_seeds["score"].mean(),
                "score_std": of_seeds["score"].std(ddof=1),
                "metric": group["metric"].iloc[0],
            }
            row |= {f"{name}_mean": of_seeds[name].mean() for name in others}
            row |= {f"{name}_std": of_seeds[name].std(ddof=1) for name in others}
            row |= {name: of_seeds[name].mean() for name in _MEANS}
            row |= {name: group[name].iloc[0] for name in SETTINGS}  # runs that differ in one have other labels
            rows.append(row | {key: group[key].iloc[0] for key in keys})
    return pd.DataFrame(rows)


def columns(table: pd.DataFrame, metric: str, *, first: str = "Method", with_score: bool = True) -> list[Column]:
    """How `comparison`'s rows are shown: the status where one is not ok, the source where one is predicted, and
    the memory categories that hold something.

    with_score=False: for runs that only measure, whose score means nothing.
    """
    shown = [
        Column(first, "label", lambda row: row["label"], is_number=False),
        Column("Trained %", "trainable_percent", lambda row: number(row["trainable_percent"], digits=2)),
        Column(capitalized(metric_name(metric)), "score_mean", score),
        *(_further(name) for name in _further_metrics(table)),
        Column("n", "n", lambda row: str(row["n"])),
        Column("Peak MiB", "peak_total_mib", lambda row: size(row["peak_total_mib"])),
    ]
    shown += [Column(name.capitalize(), key, lambda row, key=key: size(row[key])) for name, key in filled(table)]
    shown += [
        Column("Images/s", "images_per_s", lambda row: number(row["images_per_s"], digits=0)),
        Column("Adapter KiB", "adapter_kib", lambda row: size(row["adapter_kib"])),
    ]
    if not with_score:
        shown = [column for column in shown if not column.key.endswith("_mean")]
    place = next(index for index, column in enumerate(shown) if column.key == "n") + 1
    if table["predicted"].any():
        shown.insert(place, Column("Source", "predicted", lambda row: source(row["predicted"]), is_number=False))
    if (table["status"] != "ok").any():
        shown.insert(place, Column("Status", "status", lambda row: row["status"], is_number=False))
    return shown


def filled(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The memory categories, each with its column, in which any row has something."""
    pairs = zip(MEMORY_CATEGORIES, PEAKS, strict=True)
    return [(category, key) for category, key in pairs if table[key].fillna(0).any()]


def source(predicted: bool) -> str:
    """Where a row's numbers come from, in a word."""
    return "predicted" if predicted else "measured"


def display(table: pd.DataFrame, shown: Sequence[Column]) -> pd.DataFrame:
    """`table` as text: one column per entry of `shown`, under its heading."""
    return pd.DataFrame(
        {column.heading: [column.text(row) for row in rows_of(table)] for column in shown}, dtype=object
    )


def write_tables(
    table: pd.DataFrame, shown: Sequence[Column], folder: Path, *, name: str = "table"
) -> list[Path]:
    """Write <name>.csv with the bare numbers, and <name>.md and <name>.tex as shown; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = display(table, shown)
    contents = {
        "md": markdown(texts, shown),
        "csv": table.to_csv(index=False, lineterminator="\n"),
        "tex": latex(texts, shown),
    }
    paths = [folder / f"{name}.{suffix}" for suffix in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


def markdown(texts: pd.DataFrame, shown: Sequence[Column]) -> str:
    """A pipe table, aligned to be read as plain text too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [list(texts.columns), *texts.values.tolist()]]
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(shown))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for cell, width, column in zip(row, widths, shown, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rules = [
        "-" * (width - 1) + ":" if column.is_number else "-" * width
        for width, column in zip(widths, shown, strict=True)
    ]
    lines.insert(1, f"| {' | '.join(rules)} |")
    return "\n".join(lines) + "\n"


def latex(texts: pd.DataFrame, shown: Sequence[Column]) -> str:
    """A tabular for a paper; needs the package booktabs."""
    rows = [
        " & ".join(_latex_text(cell) for cell in row) + r" \\"
        for row in [list(texts.columns), *texts.values.tolist()]
    ]
    alignment = "".join("r" if column.is_number else "l" for column in shown)
    head = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{{alignment}}}",
        "\\toprule",
        rows[0],
        "\\midrule",
    ]
    return "\n".join([*head, *rows[1:], "\\bottomrule", "\\end{tabular}"]) + "\n"


def print_table(table: pd.DataFrame, shown: Sequence[Column], *, title: str) -> None:
    """The table on the terminal; where output goes to a file, lines are as long as the table needs."""
    console = Console()
    printed = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    for column in shown:
        printed.add_column(column.heading, justify="right" if column.is_number else "left")
    texts = display(table, shown)
    for status, cells in zip(table["status"], texts.values.tolist(), strict=True):
        printed.add_row(*map(escape, cells), style=None if status == "ok" else "red")
    if not console.is_terminal:
        wide = console.options.update(width=1000)
        console = Console(width=max(160, Measurement.get(console, wide, printed).maximum))
    console.print(printed)


def _further_metrics(table: pd.DataFrame) -> list[str]:
    ends = [str(name) for name in table if str(name).startswith("test_") and str(name).endswith("_mean")]
    return [name.removeprefix("test_").removesuffix("_mean") for name in ends]


def _further(metric: str) -> Column:
    key = f"test_{metric}"
    return Column(
        capitalized(metric_name(metric)),
        f"{key}_mean",
        lambda row: mean_and_std(row[f"{key}_mean"], row[f"{key}_std"]),
    )


def score(row: Row) -> str:
    """ "94.5 ± 0.6" of a row; the mean alone where there is no spread, a dash where there is neither."""
    return mean_and_std(row["score_mean"], row["score_std"])


def mean_and_std(mean: float, std: float) -> str:
    """See `score`."""
    digits = 1 if math.isnan(mean) or abs(mean) >= 10 else 3
    return number(mean, digits=digits) + ("" if math.isnan(std) else f" ± {number(std, digits=digits)}")


def size(value: float) -> str:
    """MiB or KiB: two digits below 1, one below 100, none above."""
    return number(value, digits=2 if 0 < abs(value) < 1 else 1 if abs(value) < 100 else 0)


def number(value: float, *, digits: int) -> str:
    """With thousands separated by commas; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
