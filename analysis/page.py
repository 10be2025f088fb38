"""The HTML of a report: one file, no network, sortable tables, light and dark. Everything is escaped here."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from analysis.drawing import Picture, as_svg
from analysis.page_style import CSS, SCRIPT

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
    """A part of the page with its heading; `body` is HTML."""

    identifier: str
    heading: str
    body: str


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole document. lead: HTML under the title."""
    links = "".join(f'<li><a href="#{s.identifier}">{escape(s.heading)}</a></li>' for s in sections)
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
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{lead}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>\n{parts}</main>\n'
        '<p id="announcement" class="unseen" aria-live="polite"></p>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def paragraph(text: str, *, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def bullets(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def sortable_table(
    identifier: str, caption: str, headings: Sequence[Cell], rows: Sequence[Sequence[Cell]]
) -> str:
    """A table whose header buttons sort it; the first cell of a row names it. Scrolls sideways by itself."""
    head = "".join(
        f'<th scope="col" class="{h.kind}"><button type="button">{escape(h.text)}</button></th>' for h in headings
    )
    body = "".join(
        f"<tr>{''.join(_cell(cell, is_name=index == 0) for index, cell in enumerate(row))}</tr>\n" for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-labelledby="{identifier}-caption" tabindex="0">'
        f'<table id="{identifier}" class="sortable">'
        f'<caption id="{identifier}-caption">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
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
    """The picture inlined twice, for light and for dark, with its content in words as its alternative text."""
    light, dark = (_data_uri(as_svg(picture, dark=dark)) for dark in (False, True))
    return (
        f'<figure id="{picture.name}"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.alt)}"></picture>'
        f"<figcaption><strong>{escape(picture.title)}.</strong> {escape(caption)}</figcaption></figure>"
    )


def photograph(identifier: str, png: bytes, *, title: str, caption: str) -> str:
    """A picture that a run wrote, inlined as it is."""
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    alternative = escape(f"{title}. {caption}")
    return (
        f'<figure id="{escape(identifier)}"><img class="samples" src="{source}" alt="{alternative}">'
        f"<figcaption><strong>{escape(title)}.</strong> {escape(caption)}</figcaption></figure>"
    )


def _cell(cell: Cell, *, is_name: bool) -> str:
    content = escape(cell.text)
    if cell.kind == "code":
        content = f"<code>{content}</code>"
    if cell.color is not None:
        content = f'<span class="dot" style="background:{escape(cell.color)}" aria-hidden="true"></span>{content}'
    if cell.detail:
        content += f"<small>{escape(cell.detail)}</small>"
    sort = "" if cell.sort is None or cell.sort != cell.sort else escape(str(cell.sort))
    tag, scope = ("th", ' scope="row"') if is_name else ("td", "")
    return f'<{tag}{scope} class="{cell.kind}" data-sort="{sort}">{content}</{tag}>'


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
