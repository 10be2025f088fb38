"""What a run shows while it works: a progress bar on a terminal, plain lines elsewhere, or nothing."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    """Hears of a run's steps."""

    def start(self, total_steps: int, *, done: int) -> None: ...

    def logged(self, line: Mapping[str, Any]) -> None: ...

    def evaluated(self, step: int, split: str, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def make_progress(label: str, *, quiet: bool = False) -> Progress:
    """The progress display that fits where stdout goes."""
    if quiet:
        return Silent()
    return Bar(label) if sys.stdout.isatty() else Lines(label)


class Silent:
    """Shows nothing; a comparison reports its runs itself."""

    def start(self, total_steps: int, *, done: int) -> None:
        pass

    def logged(self, line: Mapping[str, Any]) -> None:
        pass

    def evaluated(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """At most one line every few seconds, and one per evaluation that falls into that rhythm."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._total = 0
        self._last = 0.0
        self._loss = ""

    def start(self, total_steps: int, *, done: int) -> None:
        self._total = total_steps
        resumed = f", resumed after step {done}" if done else ""
        print(f"{self._label}: {total_steps} steps{resumed}", flush=True)

    def logged(self, line: Mapping[str, Any]) -> None:
        self._loss = f"loss {line['loss']:.4f}, lr {line['lr']:.2e}"
        self._print(line["step"], self._loss)

    def evaluated(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self._print(step, ", ".join([self._loss, _figures(split, metrics)]), always=step == self._total)

    def close(self) -> None:
        pass

    def _print(self, step: int, text: str, *, always: bool = False) -> None:
        now = time.monotonic()
        if always or now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"{self._label}: step {step}/{self._total}  {text}", flush=True)


class Bar:
    """One live line with a bar, the loss and the last evaluation."""

    def __init__(self, label: str) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]} {task.fields[metrics]}"),
            console=Console(),
        )
        self._task = self._bar.add_task(label, total=None, loss="", metrics="")

    def start(self, total_steps: int, *, done: int) -> None:
        self._bar.update(self._task, total=total_steps, completed=done)
        self._bar.start()

    def logged(self, line: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=line["step"], loss=f"loss {line['loss']:.4f}")

    def evaluated(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=step, metrics=_figures(split, metrics))

    def close(self) -> None:
        self._bar.stop()


def _figures(split: str, metrics: Mapping[str, float]) -> str:
    """Without what belongs to single classes: that can be a hundred figures."""
    shown = {name: value for name, value in metrics.items() if "/" not in name}
    return split + " " + " ".join(f"{name} {value:.4g}" for name, value in shown.items())
