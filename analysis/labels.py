"""Names beside points of a scatter plot, placed so that none covers a point, an error bar or another name."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

_RADII_POINTS = (7, 11, 16, 24, 34, 46, 60, 80)
_ANGLES_DEGREES = (0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202, 67, 113, 293, 247)
_MARKER_POINTS = 4.5
_LONGEST_BESIDE_A_POINT = 40  # characters
_KEY_WIDTH = 72
_KEY_INCHES_PER_LINE = 0.16
_LINE_WIDTH = 28  # of two that name a bar
_LEADER_FROM_POINTS = 14  # further away than this, a thin line says whose name it is


@dataclass(frozen=True)
class Point:
    """A named point in data coordinates, `error` its half error bar in y."""

    name: str
    x: float
    y: float
    error: float
    color: str


def names_of_points(labels: Sequence[str]) -> dict[str, str]:
    """Label → what stands beside its point: itself, or the numbers of all where one is too long for that."""
    if all(len(label) <= _LONGEST_BESIDE_A_POINT for label in labels):
        return {label: label for label in labels}
    return {label: str(number) for number, label in enumerate(dict.fromkeys(labels), start=1)}


def key_inches(names: Mapping[str, str]) -> float:
    """How much higher a figure must be for the key to its numbers."""
    lines = sum(text.count("\n") + 1 for text in _key(names).values())
    return _KEY_INCHES_PER_LINE * lines + 0.1 if lines else 0.0


def draw_key(figure: Figure, names: Mapping[str, str], looks: Mapping[str, tuple[str, str]]) -> None:
    """What the numbers stand for, below the axes; nothing where the names stand there. looks: colour, marker."""
    key = _key(names)
    handles = [
        Line2D([], [], linestyle="none", color=looks[label][0], marker=looks[label][1], label=text)
        for label, text in key.items()
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=1, fontsize=7, handletextpad=0.4)


def on_two_lines(label: str) -> str:
    """A long label would leave the bars no room: broken near its middle, and cut in the middle of a line."""
    if len(label) <= 24:
        return label
    breaks = [index + 1 for index, character in enumerate(label[:-1]) if character in ", /"]
    place = min(breaks, key=lambda index: abs(index - len(label) / 2), default=len(label) // 2)
    return "\n".join(cut(line.strip(), _LINE_WIDTH) for line in (label[:place], label[place:]))


def cut(text: str, length: int) -> str:
    """Its beginning and its end, where it is longer."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - length // 2 - 1) :]}"


def _key(names: Mapping[str, str]) -> dict[str, str]:
    """Label → its line of the key; empty where the labels stand beside the points."""
    return {
        label: textwrap.fill(f"{name}  {label}", _KEY_WIDTH) for label, name in names.items() if name != label
    }


def place_labels(axes: Axes, points: Sequence[Point]) -> list[Annotation]:
    """Write every point's name at the nearest free place; call it when nothing moves the axes any more.

    Where no place is free the name stands at the last one tried: rather a covered name than none.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Further text must not move the axes: the places were found for where they are now.
    figure.set_layout_engine("none")
    inside = axes.get_window_extent()
    taken = [box for point in points for box in _obstacles(axes, point, figure.dpi / 72)]
    written = []
    for point in points:
        annotation, box = _place(axes, point, canvas.get_renderer(), inside, taken)
        taken.append(box)
        written.append(annotation)
    return written


def text_box(annotation: Annotation, renderer: RendererAgg) -> Bbox:
    """Where a name stands, in pixels, without the line that leads to it."""
    annotation.update_positions(renderer)
    return Text.get_window_extent(annotation, renderer)


def _place(
    axes: Axes, point: Point, renderer: RendererAgg, inside: Bbox, taken: Sequence[Bbox]
) -> tuple[Annotation, Bbox]:
    annotation = axes.annotate(
        point.name,
        (point.x, point.y),
        (0, 0),
        textcoords="offset points",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": point.color, "shrinkA": 0, "shrinkB": 4},
    )
    leader = annotation.arrow_patch
    assert leader is not None
    for radius in _RADII_POINTS:
        leader.set_visible(radius > _LEADER_FROM_POINTS)
        for angle in _ANGLES_DEGREES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            annotation.set_position((radius * dx, radius * dy))
            annotation.set_horizontalalignment(("center", "left", "right")[_side(dx)])
            annotation.set_verticalalignment(("center", "bottom", "top")[_side(dy)])
            box = text_box(annotation, renderer).padded(1)
            if _is_within(box, inside) and not any(box.overlaps(other) for other in taken):
                return annotation, box
    return annotation, text_box(annotation, renderer)


def _obstacles(axes: Axes, point: Point, pixels_per_point: float) -> list[Bbox]:
    """The marker and the error bar, in pixels."""
    half = _MARKER_POINTS * pixels_per_point
    x, y = axes.transData.transform((point.x, point.y))
    _, low = axes.transData.transform((point.x, point.y - point.error))
    _, high = axes.transData.transform((point.x, point.y + point.error))
    marker = Bbox.from_extents(x - half, y - half, x + half, y + half)
    return [marker, Bbox.from_extents(x - half / 2, low, x + half / 2, high)]


def _side(direction: float) -> int:
    """0: about level, 1: ahead, -1: behind."""
    return 0 if abs(direction) < 0.3 else 1 if direction > 0 else -1


def _is_within(box: Bbox, outer: Bbox) -> bool:
    return box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1
