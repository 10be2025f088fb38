"""`snell-scale watch`: parses, and shows the runs until they have ended."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from snell_scale.results_table import console, say
from snell_scale.watch.states import RunState, RunStates
from snell_scale.watch.view import as_line, as_table, summary

# Where one run of a study has ended, the next may take so long to make its folder.
_SECONDS_UNTIL_THE_NEXT = 15.0
_SECONDS_BETWEEN_LINES = 10.0


def watch(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that runs are written to.")],
    *,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show how runs get on: progress, loss, metric, memory, images/s; until Ctrl-C, or until all have ended.

    It only reads, on any machine that sees the folders. Where nobody watches, it prints plain lines.
    "stalled?": no line for a minute, or for ten times as long as usual. Peak: of the measured step.
    """
    states = RunStates(runs)
    if once:
        console.print(as_table(states.at(time.time())))
        return
    with contextlib.suppress(KeyboardInterrupt):
        if sys.stdout.isatty():
            with Live(console=Console(), auto_refresh=False) as live:
                show_until_ended(states, lambda now: live.update(as_table(now), refresh=True), interval=interval)
        else:
            show_until_ended(states, PlainLines().show, interval=interval)


def show_until_ended(states: RunStates, show: Callable[[Sequence[RunState]], None], *, interval: float) -> None:
    """Show the states every `interval` seconds until every run has ended, and none has followed for a while.

    Where all have ended before, they are shown once. With no run yet it waits for the first.
    """
    was_running, ended_at = False, None
    while True:
        now = time.time()
        current = states.at(now)
        show(current)
        if current and all(state.has_ended for state in current):
            ended_at = now if ended_at is None else ended_at
            if not was_running or now - ended_at >= _SECONDS_UNTIL_THE_NEXT:
                return
        else:
            was_running, ended_at = True, None
        time.sleep(interval)


class PlainLines:
    """For a log: what has changed, every few seconds, and each run's end."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}
        self._at: float | None = None

    def show(self, states: Sequence[RunState]) -> None:
        now = time.monotonic()
        if not states and self._at is None:
            say(summary(states))
        is_due = self._at is None or now - self._at >= _SECONDS_BETWEEN_LINES
        changed = [state for state in states if self._shown.get(state.name) != as_line(state)]
        changed = [state for state in changed if is_due or state.has_ended]
        if is_due:
            self._at = now
        for state in changed:
            self._shown[state.name] = as_line(state)
            say(as_line(state))
        if changed and all(state.has_ended for state in states):
            say(summary(states))
