"""The report's section of samples: the pictures that runs made of their test split."""

from pathlib import Path

import pandas as pd

from analysis.groups import capitalized, with_labels
from analysis.load import Row, rows_of
from analysis.report_page.page import Section, photograph

_DURING_TRAINING = "step-"


def samples_section(runs: pd.DataFrame) -> list[Section]:
    """The pictures of each label's first run that ended ok; no section where no run has any."""
    labelled = with_labels(runs.loc[runs["compared"]])
    first = labelled.loc[labelled["status"] == "ok"].drop_duplicates("label")
    figures = [_photograph(run, path) for run in rows_of(first) for path in _pictures(Path(run["folder"]))]
    return [Section("samples", "Samples", f'<div class="figures">{"".join(figures)}</div>')] if figures else []


def _pictures(folder: Path) -> list[Path]:
    """Of the trained weights; those made during training stay in the run's folder."""
    paths = sorted((folder / "pictures").glob("*.png"))
    return [path for path in paths if not path.name.startswith(_DURING_TRAINING)]


def _photograph(run: Row, path: Path) -> str:
    what = capitalized(path.stem.replace("-", " "))
    identifier = f"{path.stem}-{run['label']}-{run['seed']}".replace(" ", "-")
    return photograph(
        identifier,
        path.read_bytes(),
        title=f"{run['label']}: {what.lower()}",
        caption=f"Test split, seed {run['seed']}.",
    )
