"""The report's section of memory and scale: size, savings beside the published, ranks, communication."""

from collections.abc import Sequence

import pandas as pd

from analysis.drawing import Picture
from analysis.report_page.page import Section, bullets, figure
from analysis.report_page.sections import shown_table
from analysis.scaling.cases import scaling_cases
from analysis.scaling.figures import memory_against_parameters, savings_by_model
from analysis.scaling.predictions import prediction_columns, prediction_sentences, predictions
from analysis.scaling.rank_figures import communication_bars, memory_against_ranks, speed_against_ranks
from analysis.scaling.ranks import rank_scaling, scaling_columns, scaling_sentences
from analysis.scaling.savings import saving_columns, saving_sentences, savings
from analysis.scaling.traffic import traffic, traffic_columns, traffic_sentences

_CAPTIONS = {
    "savings": "Peak memory beside that of other methods in equal settings, and the published savings.",
    "predictions": "Predicted beside measured peaks of the same jobs.",
    "scaling": "Images per second and memory against the number of ranks.",
    "communication": "What a step's collectives carry.",
}


def scale_section(runs: pd.DataFrame, *, most_drawn: int) -> list[Section]:
    """Whatever of it the compared runs have data for; no section where they have none.

    most_drawn: labels that a picture holds.
    """
    cases = scaling_cases(runs.loc[runs["compared"]])
    saved, checked, scaled, told = savings(cases), predictions(cases), rank_scaling(cases), traffic(cases)
    parts = {
        "savings": (saved, saving_columns, saving_sentences),
        "predictions": (checked, prediction_columns, prediction_sentences),
        "scaling": (scaled, scaling_columns, scaling_sentences),
        "communication": (told, traffic_columns, traffic_sentences),
    }
    found = {name: part for name, part in parts.items() if not part[0].empty}
    sentences = [sentence for table, _, sentences_of in found.values() for sentence in sentences_of(table)]
    tables = [
        shown_table(f"{name}-table", _CAPTIONS[name], table, columns_of(table))
        for name, (table, columns_of, _) in found.items()
    ]
    drawn = (
        memory_against_parameters(cases),
        savings_by_model(saved),
        memory_against_ranks(scaled),
        speed_against_ranks(scaled),
        communication_bars(told),
    )
    pictures = [picture for picture in drawn if picture is not None]
    hint = "Hollow: predicted." if cases["predicted"].any() else ""
    return _section(sentences, tables, pictures if cases["label"].nunique() <= most_drawn else [], hint=hint)


def _section(
    sentences: Sequence[str], tables: Sequence[str], pictures: Sequence[Picture], *, hint: str
) -> list[Section]:
    if not tables and not pictures:
        return []
    figures = "".join(figure(picture, hint) for picture in pictures)
    body = bullets(sentences) if sentences else ""
    body += f'<div class="figures">{figures}</div>' if figures else ""
    return [Section("scale", "Memory and scale", body + "".join(tables), pictures=tuple(pictures))]
