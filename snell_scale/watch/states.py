"""What is known of runs at a moment: how far they are, how fast, and whether they still move."""

import os
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from snell_scale.records import Result, read_result
from snell_scale.watch.steps_file import StepsFile

_RUN_FILES = {"environment.json", "steps.jsonl", "result.json"}
_NUM_RECENT_LINES = 11
_SECONDS_BETWEEN_SEARCHES = 5.0
_STALLED_AFTER_SECONDS = 60.0
_STALLED_AFTER_INTERVALS = 10


@dataclass(frozen=True)
class RunState:
    """One run. status: "starting", "running", "stalled?" (no line for long), or how it ended. None is not known.

    metric: the split and name of `value`. seconds_left: at the present speed, until the last step.
    age_seconds: since the last line. peak_bytes: of the measured step's memory. predicted: an estimate's record.
    reason: why a record is "damaged".
    """

    name: str
    status: str
    has_ended: bool
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    lr: float | None = None
    metric: str | None = None
    value: float | None = None
    peak_bytes: int | None = None
    images_per_s: float | None = None
    seconds_left: float | None = None
    age_seconds: float | None = None
    predicted: bool = False
    reason: str | None = None


class RunStates:
    """The runs in some folders; those that start later come to them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """A run's result.json stands for its folder. ValueError for any other path that is no folder."""
        self._paths = tuple(path.parent if path.name == "result.json" else path for path in paths)
        for path in self._paths:
            if not path.is_dir():
                raise ValueError(f"{path} is no folder; give a run folder, or a folder that runs are written to")
        self._followed: dict[Path, _Followed] = {}
        self._searched_at: float | None = None

    def at(self, now: float) -> list[RunState]:
        """Those still to end first, then by name. now: seconds since the epoch."""
        if self._searched_at is None or now - self._searched_at >= _SECONDS_BETWEEN_SEARCHES:
            self._searched_at = now
            for path in self._paths:
                self._find(path)
        states = [followed.state(now) for followed in self._followed.values()]
        return sorted(states, key=lambda state: (state.has_ended, state.name))

    def _find(self, path: Path) -> None:
        for parent, folders, files in os.walk(path):
            if _RUN_FILES & set(files):
                folders.clear()  # nothing inside a run is another run
                folder = Path(parent)
                name = str(folder.relative_to(path)) if folder != path else folder.resolve().name
                self._followed.setdefault(folder.resolve(), _Followed(folder, name))


class _Followed:
    """A run folder and what has been read of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._steps = StepsFile(folder / "steps.jsonl")
        self._batch_size = _batch_size(folder)
        self._record: tuple[int, RunState] | None = None
        self._clear()

    def state(self, now: float) -> RunState:
        lines, is_other = self._steps.new_lines()
        if is_other:
            self._clear()
        for line in lines:
            self._take(line)
        ended = self._ended()
        if ended is not None:
            return ended
        steps_per_s, total = self._steps_per_s(), self._last.get("total_steps")
        left = (total - self._step) / steps_per_s if total is not None and steps_per_s else None
        return RunState(
            name=self._name,
            status=self._status(now),
            has_ended=False,
            step=self._step,
            total_steps=total,
            loss=self._last.get("loss"),
            lr=self._last.get("lr"),
            metric=self._metric,
            value=self._value,
            peak_bytes=self._last.get("peak_memory_bytes"),
            images_per_s=steps_per_s * self._batch_size if steps_per_s and self._batch_size else None,
            seconds_left=left,
            age_seconds=self._age(now),
        )

    def _clear(self) -> None:
        self._recent: deque[dict[str, Any]] = deque(maxlen=_NUM_RECENT_LINES)
        self._last: dict[str, Any] = {}
        self._step = 0
        self._metric: str | None = None
        self._value: float | None = None

    def _take(self, line: dict[str, Any]) -> None:
        self._step = line["step"]
        if "split" not in line:
            self._last = line
            self._recent.append(line)
            return
        names = [name for name in line if name not in ("step", "split", "loss")]
        name = names[0] if names else "loss"
        self._metric, self._value = f"{line['split']} {name}", line.get(name)

    def _ended(self) -> RunState | None:
        """The state of the record, once there is one; a run that continues has none meanwhile."""
        try:
            stamp = (self._folder / "result.json").stat().st_mtime_ns
        except OSError:
            self._record = None
            return None
        if self._record is None or self._record[0] != stamp:
            self._record = stamp, self._read_record()
        return self._record[1]

    def _read_record(self) -> RunState:
        try:
            return _state_of(self._name, read_result(self._folder), self._last)
        except ValueError as error:
            return RunState(self._name, "damaged", has_ended=True, step=self._step, reason=str(error))

    def _status(self, now: float) -> str:
        age, pauses = self._age(now), [pause for pause, _ in self._pauses()]
        if age is None or not self._recent:
            return "starting"
        usual = statistics.median(pauses) if pauses else 0.0
        patience = max(_STALLED_AFTER_SECONDS, _STALLED_AFTER_INTERVALS * usual)
        return "stalled?" if age > patience else "running"

    def _age(self, now: float) -> float | None:
        written_at = self._steps.written_at()
        return None if written_at is None else max(0.0, now - written_at)

    def _steps_per_s(self) -> float | None:
        """The median over the last lines: an evaluation or a checkpoint between two of them does not count."""
        speeds = [steps / seconds for seconds, steps in self._pauses() if steps > 0]
        return statistics.median(speeds) if speeds else None

    def _pauses(self) -> list[tuple[float, int]]:
        """(seconds, steps) between each two of the last lines."""
        lines = [line for line in self._recent if "time" in line]
        pairs = zip(lines, list(lines)[1:], strict=False)
        return [(b["time"] - a["time"], b["step"] - a["step"]) for a, b in pairs if b["time"] > a["time"]]


def _batch_size(folder: Path) -> int | None:
    """Images per step, as the run's config has it."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return int(config["training"]["batch_size"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def _state_of(name: str, result: Result, last: dict[str, Any]) -> RunState:
    headline = next(iter(result.reported), result.metric)
    value = result.metrics.get("test", {}).get(headline or "")
    return RunState(
        name=name,
        status=result.status,
        has_ended=True,
        step=result.steps,
        total_steps=result.total_steps,
        loss=last.get("loss"),
        lr=last.get("lr"),
        metric=f"test {headline}" if value is not None else None,
        value=value,
        peak_bytes=((result.memory or {}).get("peak") or {}).get("total_bytes"),
        images_per_s=result.throughput.get("images_per_s"),
        predicted=result.predicted,
    )
