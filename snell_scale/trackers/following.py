"""A run's trackers: hear of its steps as its progress display does, and can neither end nor hold it."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any

from snell_scale.config import Config, to_dict
from snell_scale.progress import Progress
from snell_scale.records import Result
from snell_scale.trackers.hosted import Trackio, WeightsAndBiases
from snell_scale.trackers.interface import Tracker
from snell_scale.trackers.tensorboard import TensorBoard

_PACKAGES = {"wandb": "wandb", "trackio": "trackio"}  # TensorBoard's files need none
_NO_FIGURES = ("step", "time", "total_steps")
_CLOSING_SECONDS = 60.0


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not installed."""
    for name in names:
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"logging.trackers names {name!r}, but the package {package} is not installed: "
                f"`pip install {package}`, or leave it out (tensorboard needs no package)"
            )


class Following:
    """In place of `display`: the display itself, and on the first rank the trackers of the config."""

    def __init__(self, display: Progress, config: Config, folder: Path, *, is_first: bool) -> None:
        """Opens the trackers, each in its own thread."""
        self._display = display
        names = config.logging.trackers if is_first else ()
        self._trackers = [_Guarded(name, _opener(name, config, folder)) for name in names]
        self._ok = False

    def start(self, total_steps: int, *, done: int) -> None:
        self._display.start(total_steps, done=done)
        for tracker in self._trackers:
            tracker.start(done)

    def logged(self, line: Mapping[str, Any]) -> None:
        self._display.logged(line)
        figures = {name: value for name, value in line.items() if name not in _NO_FIGURES}
        self._log(line["step"], "train", figures)

    def evaluated(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self._display.evaluated(step, split, metrics)
        self._log(step, split, metrics)

    def ended(self, result: Result) -> None:
        """The metrics that were computed when training had ended, of the best weights."""
        self._ok = result.status == "ok"
        self._log(result.steps, "test", result.metrics.get("test", {}))

    def close(self) -> None:
        """Waits a while for figures that are still on their way. Without `ended` the run has failed."""
        self._display.close()
        for tracker in self._trackers:
            tracker.close(ok=self._ok)

    def _log(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
        values = {f"{split}/{name}": value for name, value in figures.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(step, values)


class _Guarded:
    """A tracker in a thread of its own: a slow service holds no step, what it raises ends only itself."""

    def __init__(self, name: str, opened: Callable[[], Tracker]) -> None:
        self._name = name
        self._failed = False
        # Its threads are daemons: one that hangs does not keep the process alive.
        self._pool = ThreadPool(1)
        self._tracker = self._submit(opened)

    def start(self, num_done_steps: int) -> None:
        self._submit(lambda: self._opened().start(num_done_steps))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            self._submit(lambda: self._opened().log(step, values))

    def close(self, *, ok: bool) -> None:
        closed = self._submit(lambda: self._opened().close(ok=ok))
        self._pool.close()
        closed.wait(_CLOSING_SECONDS)
        if not closed.ready():
            self._fail(TimeoutError(f"still busy {_CLOSING_SECONDS:g} s after the end of the run"))

    def _opened(self) -> Tracker:
        return self._tracker.get()

    def _submit(self, task: Callable[[], Any]) -> AsyncResult:
        return self._pool.apply_async(partial(self._run, task), error_callback=self._fail)

    def _run(self, task: Callable[[], Any]) -> Any:
        return None if self._failed else task()

    def _fail(self, error: BaseException) -> None:
        if not self._failed:
            self._failed = True
            what = f"{type(error).__name__}: {error}"
            print(f"tracker {self._name} failed, the run goes on without it: {what}", file=sys.stderr)


def _opener(name: str, config: Config, folder: Path) -> Callable[[], Tracker]:
    if name == "tensorboard":
        return partial(TensorBoard, folder)
    if name == "wandb":
        return partial(WeightsAndBiases, config.name, to_dict(config), folder)
    return partial(Trackio, config.name, to_dict(config))
