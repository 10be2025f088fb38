"""How the states of runs are shown: a table, or a line for a log."""

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from snell_scale.watch.states import RunState

_COLORS = {"running": "green", "starting": "cyan", "stalled?": "yellow", "ok": "none", "interrupted": "yellow"}
_UNKNOWN = "–"
_HEADINGS: tuple[str, ...] = ("step", "loss", "lr", "metric", "peak MiB", "images/s", "left", "last line")
_FIRST_TO_GO = ("lr", "last line", "images/s", "left", "peak MiB", "loss")  # where the terminal is narrow
_NAME_WIDTH = 24  # at least this much of a name stands on one line
_METRIC_WIDTH = 24
_UNLIMITED = 1_000


def as_table(states: Sequence[RunState]) -> Group:
    """One row per run, how many there are of each status, and what is wrong with damaged records."""
    reasons = [escape(f"{state.name}: {state.reason}") for state in states if state.reason]
    return Group(_AsWideAsFits(states), summary(states), *reasons)


def summary(states: Sequence[RunState]) -> str:
    """ "3 runs: 1 running, 2 ok"."""
    counts = ", ".join(f"{count} {status}" for status, count in Counter(map(_status, states)).items())
    return f"{len(states)} run{'' if len(states) == 1 else 's'}: {counts}" if states else "no run yet"


def as_line(state: RunState) -> str:
    """ "lora-seed0: running, step 120/240 (50 %), loss 0.5123, …", with what is known."""
    step, loss, lr, metric, peak, speed, left, _ = _cells(state)
    named = {"step": step, "loss": loss, "lr": lr, "": metric, "peak MiB": peak, "images/s": speed, "left": left}
    known = [f"{name} {text}".strip() for name, text in named.items() if text != _UNKNOWN]
    return f"{state.name}: {', '.join([_status(state), *known, *([state.reason] if state.reason else [])])}"


class _AsWideAsFits:
    """The table of runs, without the least telling columns where the terminal has no room for them."""

    def __init__(self, states: Sequence[RunState]) -> None:
        self._states = states

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        longest = max([len("run"), *(len(state.name) for state in self._states)])
        at_least = min(longest, _NAME_WIDTH)
        metric_width = min(max([len("metric"), *(len(_metric(state)) for state in self._states)]), _METRIC_WIDTH)
        hidden: Sequence[str] = ()
        room = 0
        for count in range(len(_FIRST_TO_GO) + 1):
            hidden = _FIRST_TO_GO[:count]
            least = self._table(hidden, name_width=at_least, metric_width=metric_width)
            room = options.max_width - Measurement.get(console, options.update_width(_UNLIMITED), least).maximum
            if room >= 0:
                break
        yield self._table(hidden, name_width=min(longest, at_least + max(0, room)))

    def _table(self, hidden: Sequence[str], *, name_width: int, metric_width: int | None = None) -> Table:
        """metric_width: at most; None: what there is room for."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("run", overflow="fold", width=name_width)
        table.add_column("status", no_wrap=True)
        shown = [heading for heading in _HEADINGS if heading not in hidden]
        for heading in shown:
            is_metric = heading == "metric"
            width = metric_width if is_metric else None
            table.add_column(heading, justify="right", no_wrap=not is_metric, max_width=width)
        for state in self._states:
            cells = dict(zip(_HEADINGS, _cells(state), strict=True))
            status = f"[{_COLORS.get(state.status, 'red')}]{_status(state)}[/]"
            table.add_row(escape(state.name), status, *(escape(cells[heading]) for heading in shown))
        return table


def _status(state: RunState) -> str:
    return f"{state.status} (predicted)" if state.predicted else state.status


def _cells(state: RunState) -> list[str]:
    return [
        _progress(state),
        _figure(state.loss, ".4f"),
        _figure(state.lr, ".2e"),
        _metric(state),
        _UNKNOWN if state.peak_bytes is None else f"{state.peak_bytes / 2**20:,.1f}",
        _figure(state.images_per_s, ",.0f"),
        _duration(state.seconds_left),
        _duration(state.age_seconds),
    ]


def _metric(state: RunState) -> str:
    return f"{state.metric} {_figure(state.value, '.4g')}" if state.metric else _UNKNOWN


def _progress(state: RunState) -> str:
    if state.total_steps is None:
        return str(state.step)
    return f"{state.step}/{state.total_steps} ({100 * state.step / state.total_steps:.0f} %)"


def _figure(value: float | None, style: str) -> str:
    return _UNKNOWN if value is None else format(value, style)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3_600:.1f} h"
