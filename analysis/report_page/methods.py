"""The report's section of methods beside the baseline: paired tests, Pareto front; or why there are none."""

from collections.abc import Mapping

import pandas as pd

from analysis.comparison.columns import comparison_columns
from analysis.comparison.fairness import unlike_fields
from analysis.comparison.methods_table import methods_table
from analysis.comparison.notes import notes
from analysis.comparison.pareto import pareto_picture
from analysis.drawing import Picture, Style, styles_of
from analysis.groups import metric_of
from analysis.report_page.page import Section, bullets, figure, paragraph
from analysis.report_page.sections import shown_table

_REFUSED = (
    "These runs are not alike, so a comparison of their methods would not be fair. python -m analysis.compare "
    "compares within each value of a field (--by FIELD), or all the same and labelled (--force)."
)
_CAPTION = (
    "Mean ± half of the 95 % interval. Difference: from the baseline over common seeds, with p values corrected "
    "by Holm. A heading sorts."
)


def methods_section(
    runs: pd.DataFrame, styles: Mapping[str, Style], colors: Mapping[str, str], *, most_drawn: int
) -> list[Section]:
    """Of the measured runs that are compared; no section where these have one method only.

    styles, colors: of the labels in the rest of the report. most_drawn: rows that the picture holds.
    """
    runs = runs.loc[runs["compared"] & ~runs["predicted"]]
    if runs["method"].nunique() < 2:
        return []
    unlike = unlike_fields(runs)
    if unlike:
        return [_section(paragraph(_REFUSED) + bullets([difference.describe() for difference in unlike]))]
    metric = metric_of(runs)
    try:
        table = methods_table(runs, metric)
    except ValueError as error:  # two runs of one method and seed
        return [_section(paragraph(f"There is no comparison of the methods: {error}."))]
    shown = comparison_columns(table, metric)
    body = shown_table("methods-table", _CAPTION, table, shown, colors=colors)
    body += bullets(notes(table, runs, metric, label="", by=()))
    looks = styles_of(table) | dict(styles)
    picture = pareto_picture(table, metric, looks, name="pareto", title="Filled: on the Pareto front")
    if picture is None or len(table) > most_drawn:
        return [_section(body)]
    drawn = figure(picture, "Metric against memory and throughput.")
    return [_section(f'{body}<div class="figures">{drawn}</div>', picture)]


def _section(body: str, *pictures: Picture) -> Section:
    return Section("methods", "Methods beside the baseline", body, pictures=pictures)
