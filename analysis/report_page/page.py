"""The HTML of a report: one file, no network, its style and scripts from web/. Everything is escaped here."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from analysis.drawing import Picture, as_svg

_SCRIPTS = ("chart.js", "plots.js", "table.js")  # in the order in which they build on each other
# The page may show its own pictures and run its own script; nothing else, from nowhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Cell:
    """One table cell: its text, what it sorts by (None: last), and how it looks.

    kind: "" | "number" | "code" | "bad". color: of a dot before the text, None for no dot.
    """

    text: str
    sort: float | str | None = None
    kind: str = ""
    color: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page with its heading; `body` is HTML. parts: what else in it the navigation leads to.

    pictures: those in it that are written as files too.
    """

    identifier: str
    heading: str
    body: str
    parts: tuple[tuple[str, str], ...] = ()
    pictures: tuple[Picture, ...] = ()


def page(title: str, lead: str, sections: Sequence[Section], *, data: Mapping[str, Any]) -> str:
    """The whole document. lead: HTML under the title. data: what the scripts plot and filter by."""
    places = [place for s in sections for place in ((s.identifier, s.heading), *s.parts)]
    links = "".join(f'<li><a href="#{identifier}">{escape(name)}</a></li>' for identifier, name in places)
    parts = "".join(
        f'<section id="{s.identifier}" aria-labelledby="{s.identifier}-heading">'
        f'<h2 id="{s.identifier}-heading">{escape(s.heading)}</h2>{s.body}</section>\n'
        for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_web('page.css')}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{lead}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>\n{parts}</main>\n'
        '<p id="announcement" class="unseen" aria-live="polite"></p>\n'
        f'<script type="application/json" id="runs-data">{_json(data)}</script>\n'
        f"{''.join(f'<script>{_web(name)}</script>' for name in _SCRIPTS)}\n</body>\n</html>\n"
    )


def paragraph(text: str, *, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def bullets(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def steps(items: Sequence[str]) -> str:
    return "<ol>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ol>"


def subheading(identifier: str, text: str) -> str:
    return f'<h3 id="{identifier}">{escape(text)}</h3>'


def sortable_table(
    identifier: str,
    caption: str,
    headings: Sequence[Cell],
    rows: Sequence[Sequence[Cell]],
    *,
    page_size: int | None = None,
) -> str:
    """A table whose header buttons sort it; the first cell of a row names it. Scrolls sideways by itself.

    page_size: rows shown at a time, with buttons that turn the pages; on paper, or without scripts, all are.
    """
    size = f' data-page-size="{page_size}"' if page_size else ""
    head = "".join(
        f'<th scope="col" class="{h.kind}"><button type="button">{escape(h.text)}</button></th>' for h in headings
    )
    body = "".join(
        f"<tr>{''.join(_cell(cell, is_name=index == 0) for index, cell in enumerate(row))}</tr>\n" for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-labelledby="{identifier}-caption" tabindex="0">'
        f'<table id="{identifier}" class="sortable"{size}>'
        f'<caption id="{identifier}-caption">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
        f"{_pager(identifier) if page_size else ''}"
    )


def filter_form(table: str, choices: Mapping[str, tuple[str, Sequence[str]]]) -> str:
    """A search and a choice per entry (name → heading, options) for the rows of a table, shown by the script."""
    selects = "".join(
        f'<label>{escape(heading)} <select name="{escape(name)}"><option value="">all</option>'
        f"{''.join(f'<option>{escape(option)}</option>' for option in options)}</select></label>"
        for name, (heading, options) in choices.items()
    )
    return (
        f'<form class="filters" role="search" aria-label="Filter the runs" data-filters="{table}" hidden>'
        f'<label>Words in the row <input type="search" name="search" autocomplete="off"></label>{selects}'
        '<button type="reset">Clear</button><output></output></form>'
    )


def plain_table(identifier: str, caption: str, rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, two columns."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in rows
    )
    return (
        f'<div class="scroll" role="region" aria-labelledby="{identifier}-caption" tabindex="0">'
        f'<table id="{identifier}"><caption id="{identifier}-caption">{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">What</th><th scope="col">Value</th></tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def figure(picture: Picture, caption: str) -> str:
    """The picture, with its content in words as its alternative text."""
    heading = f"<strong>{escape(picture.title)}.</strong>"
    return (
        f'<figure id="{picture.name}" aria-label="{escape(picture.title)}">{_image(picture)}'
        f"<figcaption>{heading} {escape(caption)}</figcaption></figure>"
    )


def plot(kind: str, picture: Picture | None, *, title: str, caption: str) -> str:
    """A plot that web/plots.js draws from the page's data; `picture` is what stands there without scripts."""
    image = "<noscript>This plot needs scripts.</noscript>" if picture is None else _image(picture)
    return (
        f'<figure id="plot-{kind}" data-plot="{kind}" aria-label="{escape(title)}">{image}'
        f"<figcaption><strong>{escape(title)}.</strong> {escape(caption)}</figcaption></figure>"
    )


def photograph(identifier: str, png: bytes, *, title: str, caption: str) -> str:
    """A picture that a run wrote, inlined as it is."""
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    alternative = escape(f"{title}. {caption}")
    return (
        f'<figure id="{escape(identifier)}" aria-label="{escape(title)}">'
        f'<img class="samples" src="{source}" alt="{alternative}">'
        f"<figcaption><strong>{escape(title)}.</strong> {escape(caption)}</figcaption></figure>"
    )


def _cell(cell: Cell, *, is_name: bool) -> str:
    content = escape(cell.text)
    if cell.kind == "code":
        content = f"<code>{content}</code>"
    if cell.color is not None:
        content = f'<span class="dot" style="background:{escape(cell.color)}" aria-hidden="true"></span>{content}'
    if is_name:
        content = f'<div class="name">{content}</div>'
    if cell.detail:
        content += f"<small>{escape(cell.detail)}</small>"
    sort = "" if cell.sort is None or cell.sort != cell.sort else escape(str(cell.sort))
    tag, scope = ("th", ' scope="row"') if is_name else ("td", "")
    return f'<{tag}{scope} class="{cell.kind}" data-sort="{sort}">{content}</{tag}>'


def _image(picture: Picture) -> str:
    """Inlined twice, for light and for dark."""
    light, dark = (_data_uri(as_svg(picture, dark=dark)) for dark in (False, True))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.alt)}"></picture>'
    )


def _pager(table: str) -> str:
    return (
        f'<nav class="pager" id="{table}-pager" aria-label="Pages of the table" hidden>'
        '<button type="button">Previous</button><span></span><button type="button">Next</button></nav>'
    )


def _web(name: str) -> str:
    return (files("analysis.report_page") / "web" / name).read_text(encoding="utf-8")


def _json(data: Mapping[str, Any]) -> str:
    """For inside a script element: no "<" of the data can end it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
