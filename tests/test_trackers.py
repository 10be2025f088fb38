"""Trackers receive what a run logs; TensorBoard's files are read back bit by bit; no tracker can harm a run."""

import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snell_scale.config import Config
from snell_scale.progress import Silent
from snell_scale.records import read_steps
from snell_scale.run import run
from snell_scale.trackers import following
from snell_scale.trackers.following import Following
from snell_scale.trackers.tensorboard import TensorBoard, crc32c

Scalars = dict[str, list[tuple[int, float]]]

# In place of the packages: what was called, in order, as lines of JSON; TROUBLE says which call raises.
_FAKE = """
import json, os, pathlib

class Run:
    def __init__(self):
        self.summary = {}
    def log(self, values, step):
        note("log", step, values)
    def finish(self, **end):
        note("finish", end, self.summary)

def note(call, *what):
    if os.environ.get("TROUBLE") == call:
        raise ConnectionError("the service is gone")
    with pathlib.Path(os.environ["NOTES"]).open("a") as file:
        file.write(json.dumps([call, *what]) + "\\n")

def init(**options):
    note("init", options)
    return Run()
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[Any]]]:
    """Fake wandb and trackio; returns the calls that they have had."""
    place, notes = tmp_path / "packages", tmp_path / "notes"
    place.mkdir()
    notes.touch()
    for name in ("wandb", "trackio"):
        (place / f"{name}.py").write_text(_FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("NOTES", str(notes))
    return lambda: [json.loads(line) for line in notes.read_text().splitlines()]


def read_events(path: Path) -> Iterator[dict[int, list[Any]]]:
    """The events of a file, each checked by both of its sums."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12]) == (_masked(data[:8]),)
        assert struct.unpack("<I", data[12 + length : 16 + length]) == (_masked(event),)
        yield _fields(event)
        data = data[16 + length :]


def scalars_in(folder: Path) -> Scalars:
    """Tag → (step, value) as TensorBoard would show them: after a restart the steps done again are void."""
    found: Scalars = {}
    for path in sorted(folder.iterdir()):
        for event in read_events(path):
            step = event.get(2, [0])[0]
            if 7 in event and _fields(event[7][0]) == {1: [1]}:
                found = {tag: [entry for entry in entries if entry[0] < step] for tag, entries in found.items()}
            for value in _fields(event[5][0])[1] if 5 in event else []:
                fields = _fields(value)
                found.setdefault(fields[1][0].decode(), []).append((step, struct.unpack("<f", fields[2][0])[0]))
    return found


def test_checksum_of_known_data() -> None:
    """RFC 3720, B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_event_file(tmp_path: Path) -> None:
    before = time.time()
    tracker = TensorBoard(tmp_path)
    tracker.start(0)
    tracker.log(300, {"train/loss": 0.25, "a/μ": float("inf")})
    tracker.close(ok=True)
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    version, start, event = read_events(path)
    assert version[3] == [b"brain.Event:2"]
    assert (start[2], start[7]) == ([1], [b"\x08\x01"])
    assert event[2] == [300]
    assert before <= struct.unpack("<d", event[1][0])[0] <= time.time()
    assert scalars_in(tmp_path / "tensorboard") == {"train/loss": [(300, 0.25)], "a/μ": [(300, float("inf"))]}


def test_run_with_tensorboard(tiny: Callable[..., Config]) -> None:
    config = tiny("logging.trackers=[tensorboard]")
    result = run(config, quiet=True)
    folder = Path(config.output_dir) / config.name
    scalars, lines = scalars_in(folder / "tensorboard"), read_steps(folder)
    logged = [line for line in lines if "loss" in line and "split" not in line]
    assert scalars["train/loss"] == [(line["step"], pytest.approx(line["loss"])) for line in logged]
    assert scalars["train/lr"][-1] == (8, pytest.approx(logged[-1]["lr"]))
    evaluated = [(line["step"], pytest.approx(line["top1"])) for line in lines if "split" in line]
    assert scalars["validation/top1"] == evaluated
    assert scalars["test/top1"] == [(8, pytest.approx(result.metrics["test"]["top1"]))]
    assert not [tag for tag in scalars if tag.endswith(("/step", "/time", "/total_steps"))]


def test_continued_run_voids_the_steps_done_again(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path)
    first.start(0)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": 1.0})
    second = TensorBoard(tmp_path)
    second.start(2)
    second.log(3, {"train/loss": 0.5})
    for tracker in (first, second):
        tracker.close(ok=True)
    assert scalars_in(tmp_path / "tensorboard") == {"train/loss": [(1, 1.0), (2, 1.0), (3, 0.5)]}


def test_overwritten_run_leaves_no_events(tiny: Callable[..., Config]) -> None:
    config = tiny("logging.trackers=[tensorboard]", "training.steps=2")
    folder = Path(config.output_dir) / config.name / "tensorboard"
    run(config, quiet=True)
    (before,) = folder.iterdir()
    run(config, quiet=True, overwrite=True)
    (after,) = folder.iterdir()
    assert before != after


def test_run_with_hosted_trackers(tiny: Callable[..., Config], calls: Callable[[], list[list[Any]]]) -> None:
    config = tiny("logging.trackers=[wandb]", "training.steps=4")
    assert run(config, quiet=True).status == "ok"
    noted = calls()
    assert noted[0][0] == "init"
    folder = Path(config.output_dir) / config.name
    options = noted[0][1]
    assert (options["project"], options["name"], options["dir"]) == ("snell-scale", "tiny", str(folder))
    assert options["config"]["training"]["steps"] == 4
    logged = [(step, sorted(values)) for call, step, values in noted[1:-1] if call == "log"]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 4, 4]
    assert [names for _, names in logged[-2:]] == [
        ["validation/loss", "validation/top1"],
        ["test/loss", "test/top1"],
    ]
    assert noted[-1] == ["finish", {"exit_code": 0}, {"resumed_after_step": 0}]


def test_trackio(tiny: Callable[..., Config], calls: Callable[[], list[list[Any]]]) -> None:
    run(tiny("logging.trackers=[trackio]", "training.steps=2"), quiet=True)
    noted = calls()
    assert (noted[0][1]["project"], noted[0][1]["name"]) == ("snell-scale", "tiny")
    assert [call for call, *_ in noted] == ["init", "log", "log", "log", "log", "finish"]


def test_failed_run_is_told_as_failed(
    tiny: Callable[..., Config], calls: Callable[[], list[list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("snell_scale.loop._set_learning_rate", breaks)
    with pytest.raises(RuntimeError, match="broken"):
        run(tiny("logging.trackers=[wandb]"), quiet=True)
    assert calls()[-1][:2] == ["finish", {"exit_code": 1}]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_missing_package_is_told_before_anything_is_made(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(following.importlib.util, "find_spec", lambda name: None)
    config = tiny(f"logging.trackers=[tensorboard, {package}]")
    with pytest.raises(ValueError, match=f"`pip install {package}`"):
        run(config, quiet=True)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_failing_tracker_ends_with_one_warning_and_the_run_goes_on(
    tiny: Callable[..., Config],
    calls: Callable[[], list[list[Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
) -> None:
    monkeypatch.setenv("TROUBLE", call)
    config = tiny("logging.trackers=[wandb, tensorboard]", "training.steps=4")
    assert run(config, quiet=True).status == "ok"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert warnings == ["tracker wandb failed, the run goes on without it: ConnectionError: the service is gone"]
    assert len(calls()) == {"init": 0, "log": 1, "finish": 7}[call]
    tags = scalars_in(Path(config.output_dir) / config.name / "tensorboard")
    assert len(tags["train/loss"]) == 4


def test_hanging_tracker_holds_no_step(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()
    monkeypatch.setattr(TensorBoard, "log", lambda *_: released.wait(60))
    monkeypatch.setattr(following, "_CLOSING_SECONDS", 0.2)
    followers = Following(
        Silent(), tiny("logging.trackers=[tensorboard]"), Path(tiny().output_dir), is_first=True
    )
    started = time.monotonic()
    for step in range(1, 50):
        followers.logged({"step": step, "loss": 1.0})
    followers.close()
    assert time.monotonic() - started < 10
    assert "still busy 0.2 s after the end of the run" in capsys.readouterr().err
    released.set()


def test_hanging_tracker_does_not_keep_the_process() -> None:
    program = """
import time
from snell_scale.trackers import following
following._CLOSING_SECONDS = 0.2
guarded = following._Guarded("slow", lambda: time.sleep(600))
guarded.close(ok=True)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("tracker slow failed")) == (0, 1), done.stderr


def test_only_the_first_rank_tracks(tiny: Callable[..., Config], tmp_path: Path) -> None:
    followers = Following(Silent(), tiny("logging.trackers=[tensorboard]"), tmp_path / "run", is_first=False)
    followers.start(8, done=0)
    followers.logged({"step": 1, "loss": 1.0})
    followers.close()
    assert not (tmp_path / "run").exists()


def test_unknown_tracker_is_refused(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match="'tensorboard', 'wandb' or 'trackio'"):
        tiny("logging.trackers=[mlflow]")


def _masked(data: bytes) -> int:
    """Bit by bit, as the definition has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def _fields(message: bytes) -> dict[int, list[Any]]:
    """A protocol buffer's fields by number: numbers of varints, bytes of everything else."""
    found: dict[int, list[Any]] = {}
    while message:
        key, message = _varint(message)
        value: Any
        if key & 7 == 0:
            value, message = _varint(message)
        else:
            length, message = _varint(message) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], message)
            value, message = message[:length], message[length:]
        found.setdefault(key >> 3, []).append(value)
    return found


def _varint(data: bytes) -> tuple[int, bytes]:
    value = 0
    for index, byte in enumerate(data):
        value |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            return value, data[index + 1 :]
    raise AssertionError("a number without an end")
