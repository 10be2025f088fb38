"""What all figures share: colours, markers, fonts, the light and dark theme, and how a picture is written."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH_INCHES = 4.8  # fits a paper, and leaves the text readable on a phone
FOREGROUND = "foreground"  # black on white, white on black
# Okabe and Ito's colour-blind-safe set, without its yellow (too pale on white), and a grey.
_METHOD_STYLES = {
    "snell": ("#D55E00", "o"),
    "snella": ("#CC79A7", "D"),
    "lora": ("#0084D1", "s"),
    "klora": ("#56B4E9", "^"),
    "full": (FOREGROUND, "P"),
    "gps": ("#009E73", "v"),
    "shira": ("#E69F00", "X"),
    "bias": ("#9A8A2E", "<"),
    "probe": ("#8C8C8C", ">"),
}
# For methods not named above, and for further variants of one method: each differs from the one before in colour
# and in marker, and as 7 and 4 have no common divisor, pairs repeat after 28. SNELL's own colour comes last.
_OTHER_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0084D1", "#8C8C8C", "#D55E00")
_OTHER_STYLES = tuple((_OTHER_COLORS[n % 7], "h*pd"[n % 4]) for n in range(28))
CATEGORY_COLORS = {
    "parameters": "#4477AA",
    "gradients": "#EE6677",
    "optimizer": "#CCBB44",
    "activations": "#66CCEE",
    "transients": "#D55E00",
    "communication": "#AA3377",
    "temporary": "#AAAAAA",
    "unexplained": "#666666",
}
_FONT = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a "$" in a label is a "$"
    "savefig.dpi": 200,
    "svg.hashsalt": "snell-scale",  # equal data give equal files
    "pdf.fonttype": 42,  # TrueType, embedded: what conferences ask for, and text that can be searched
}


@dataclass(frozen=True)
class Style:
    color: str
    marker: str


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn in any theme: file name, title, its content in words, and its drawing."""

    name: str
    title: str
    alt: str
    draw: Callable[[], Figure]


def styles_of(table: pd.DataFrame) -> dict[str, Style]:
    """Label → the colour and marker it has in every figure; a method's first label gets the method's own."""
    styles, taken, others = {}, set(), cycle(_OTHER_STYLES)
    for label, method in zip(table["label"], table["method"], strict=True):
        if label in styles:
            continue
        is_first = method in _METHOD_STYLES and method not in taken
        taken.add(method)
        styles[label] = Style(*(_METHOD_STYLES[method] if is_first else next(others)))
    return styles


def write_png(picture: Picture, folder: Path) -> Path:
    """Write <name>.png, 200 dpi on white."""
    return _write(picture, folder, "png")


def write_pdf(picture: Picture, folder: Path) -> Path:
    """Write <name>.pdf, vectors on white with embedded fonts, as wide as a column of a paper."""
    return _write(picture, folder, "pdf")


def as_svg(picture: Picture, *, dark: bool) -> bytes:
    """The picture as SVG on a transparent ground, for a light or a dark page."""
    return _render(picture, "svg", dark=dark)


def color_of(style: Style) -> str:
    """A style's colour in the theme that is being drawn."""
    return text_color() if style.color == FOREGROUND else style.color


def text_color() -> str:
    """The foreground of the theme that is being drawn."""
    return matplotlib.rcParams["text.color"]


def method_style(method: str) -> Style:
    """What a method has wherever its variants need not be told apart."""
    return Style(*_METHOD_STYLES.get(method, _OTHER_STYLES[0]))


def new_figure(*, height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.subplots()


def _write(picture: Picture, folder: Path, suffix: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{picture.name}.{suffix}"
    path.write_bytes(_render(picture, suffix, dark=False))
    return path


# No date and no version in the file: equal data give equal files.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}


def _render(picture: Picture, suffix: str, *, dark: bool) -> bytes:
    settings: Any = _FONT | _theme(dark=dark)
    with matplotlib.rc_context(settings):
        buffer = io.BytesIO()
        picture.draw().savefig(buffer, format=suffix, transparent=suffix == "svg", metadata=_METADATA[suffix])
    return buffer.getvalue()


def _theme(*, dark: bool) -> dict[str, Any]:
    front, back, faint = ("#e8eaed", "#16191d", "#3a4048") if dark else ("#1b1f24", "#ffffff", "#e3e6ea")
    names = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    return {
        **dict.fromkeys(names, front),
        "grid.color": faint,
        "figure.facecolor": back,
        "axes.facecolor": back,
        "savefig.facecolor": back,
    }
