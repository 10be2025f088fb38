"""Watching runs: what grows is read once, states follow from the files, and the view ends when it should."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from snell_scale.config import Config
from snell_scale.records import StepWriter
from snell_scale.run import run
from snell_scale.watch import command
from snell_scale.watch.command import PlainLines, show_until_ended
from snell_scale.watch.states import RunState, RunStates
from snell_scale.watch.steps_file import StepsFile
from tests.command_line import call
from tests.watched_runs import append, end_run, write_run


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    steps = StepsFile(path)
    assert steps.new_lines() == ([], False)
    append(path, '{"step": 1}\n{"step": 2}\n{"st')
    assert steps.new_lines() == ([{"step": 1}, {"step": 2}], True)
    # What was read before is not looked at again, whatever stands there now.
    with path.open("r+") as file:
        file.write("x" * 12)
    append(path, 'ep": 3}\nno json\n{"other": 4}\n')
    assert steps.new_lines() == ([{"step": 3}], False)
    assert steps.new_lines() == ([], False)


def test_file_of_a_continued_run_is_read_from_its_start(tmp_path: Path) -> None:
    writer = StepWriter(tmp_path, keep_until_step=0)
    for step in (1, 2, 3):
        writer.write({"step": step})
    writer.close()
    steps = StepsFile(tmp_path / "steps.jsonl")
    steps.new_lines()
    continued = StepWriter(tmp_path, keep_until_step=2)
    continued.write({"step": 3, "again": True})
    continued.close()
    assert steps.new_lines() == ([{"step": 1}, {"step": 2}, {"step": 3, "again": True}], True)


def test_state_of_a_running_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "study" / "lora", num_lines=5)
    append(folder / "steps.jsonl", '{"step": 50, "split": "validation", "loss": 0.2, "top1": 88.5}\n')
    (state,) = RunStates([tmp_path]).at(time.time() + 3)
    assert (state.name, state.status, state.has_ended) == ("study/lora", "running", False)
    assert (state.step, state.total_steps, state.loss, state.lr) == (50, 100, 0.2, 1e-3)
    assert (state.metric, state.value) == ("validation top1", 88.5)
    assert state.peak_bytes == 3 * 2**20
    # Ten steps of 32 images in two seconds; fifty steps are left.
    assert state.images_per_s == pytest.approx(160)
    assert state.seconds_left == pytest.approx(10)
    assert state.age_seconds == pytest.approx(3, abs=1)


def test_a_pause_between_lines_does_not_spoil_the_speed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_lines=6)
    late = {"step": 70, "loss": 0.1, "time": time.time() + 500, "total_steps": 100}
    append(folder / "steps.jsonl", json.dumps(late) + "\n")
    (state,) = RunStates([folder]).at(time.time())
    assert state.images_per_s == pytest.approx(160)


def test_states_follow_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "environment.json").write_text("{}")
    states, now = RunStates([folder]), time.time()
    assert [state.status for state in states.at(now)] == ["starting"]
    (folder / "environment.json").unlink()
    folder.rmdir()
    write_run(folder)
    assert [state.status for state in states.at(now)] == ["running"]
    assert [state.status for state in states.at(now + 59)] == ["running"]
    assert [state.status for state in states.at(now + 62)] == ["stalled?"]
    end_run(folder, "oom")
    (ended,) = states.at(now)
    assert (ended.status, ended.has_ended, ended.step, ended.total_steps) == ("oom", True, 100, 100)
    assert (ended.metric, ended.value, ended.images_per_s) == ("test top1", 91.25, 512)
    assert ended.peak_bytes == 5 * 2**20
    (folder / "result.json").unlink()
    assert [state.status for state in states.at(now)] == ["running"]
    (folder / "result.json").write_text("{")
    assert [state.status for state in states.at(now)] == ["damaged"]


def test_patience_grows_with_the_usual_pause(tmp_path: Path) -> None:
    now = time.time()
    folder = write_run(tmp_path / "run", num_lines=1)
    lines = [{"step": 10 * n, "loss": 1.0, "time": now + 20 * n, "total_steps": 100} for n in (2, 3, 4)]
    append(folder / "steps.jsonl", *(json.dumps(line) + "\n" for line in lines))
    states = RunStates([folder])
    assert [state.status for state in states.at(now + 190)] == ["running"]
    assert [state.status for state in states.at(now + 210)] == ["stalled?"]


def test_runs_that_start_later_are_found(tmp_path: Path) -> None:
    end_run(write_run(tmp_path / "a"))
    states, now = RunStates([tmp_path, tmp_path / "a"]), time.time()
    assert [state.name for state in states.at(now)] == ["a"]
    write_run(tmp_path / "b")
    assert [state.name for state in states.at(now + 1)] == ["a"]
    assert [state.name for state in states.at(now + 6)] == ["b", "a"]


@pytest.mark.parametrize("broken", ["{", "training: [", "training: 3", "training: {batch_size: many}"])
def test_without_a_readable_config_there_is_no_images_per_second(tmp_path: Path, broken: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text(broken)
    (state,) = RunStates([folder]).at(time.time())
    assert (state.images_per_s, state.step) == (None, 40)
    assert state.seconds_left == pytest.approx(12)


def test_a_real_run_writes_what_is_shown(tiny: Callable[..., Config]) -> None:
    config = tiny()
    run(config, quiet=True)
    folder = Path(config.output_dir) / config.name
    (ended,) = RunStates([folder]).at(time.time())
    peak = ended.peak_bytes
    (folder / "result.json").unlink()
    (state,) = RunStates([folder]).at(time.time())
    assert (state.status, state.step, state.total_steps, state.seconds_left) == ("running", 8, 8, 0)
    assert (state.metric, state.peak_bytes) == ("validation top1", peak)
    assert state.images_per_s is not None
    assert state.images_per_s > 0


class _Clock:
    """Time that passes only while somebody sleeps; `at` says what happens when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: Mapping[int, Callable[[], object]]) -> None:
        self.start, self.looks, self._at = time.time(), 0, at
        monkeypatch.setattr(command.time, "time", lambda: self.start + self.looks)
        monkeypatch.setattr(command.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds == 1.0
        self.looks += 1
        self._at.get(self.looks, lambda: None)()


def test_it_ends_when_all_have_ended_and_none_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = write_run(tmp_path / "first"), tmp_path / "second"
    happens = {3: lambda: end_run(first), 12: lambda: write_run(second), 30: lambda: end_run(second)}
    clock, shown = _Clock(monkeypatch, happens), []
    show_until_ended(RunStates([tmp_path]), shown.append, interval=1.0)
    assert clock.looks == 45
    assert [state.status for state in shown[20]] == ["running", "ok"]
    assert [state.has_ended for state in shown[-1]] == [True, True]


def test_runs_that_have_ended_are_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_run(write_run(tmp_path / "run"))
    clock, shown = _Clock(monkeypatch, {}), []
    show_until_ended(RunStates([tmp_path]), shown.append, interval=1.0)
    assert (clock.looks, len(shown)) == (0, 1)


def test_it_waits_for_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    happens = {20: lambda: end_run(write_run(folder))}
    clock, shown = _Clock(monkeypatch, happens), []
    show_until_ended(RunStates([tmp_path]), shown.append, interval=1.0)
    assert shown[0] == []
    assert 20 < clock.looks <= 40


def test_log_has_changes_now_and_then_and_every_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_SECONDS_BETWEEN_LINES", 3600.0)
    lines = PlainLines()
    running = [RunState("a", "running", False, step=step) for step in (1, 2)]
    lines.show([running[0]])
    lines.show([running[1]])
    lines.show([RunState("a", "ok", True, step=3)])
    assert capsys.readouterr().out.splitlines() == [
        "a: running, step 1",
        "a: ok, step 3",
        "1 run: 1 ok",
    ]


def test_once_prints_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "lora[0]")
    code, out, _ = call(monkeypatch, capsys, "watch", "--once", str(tmp_path))
    assert code == 0
    assert "lora[0]" in out
    assert "40/100 (40 %)" in out
    assert "1 run: 1 running" in out


def test_result_file_stands_for_its_folder(tmp_path: Path) -> None:
    end_run(write_run(tmp_path / "lora"))
    assert [state.name for state in RunStates([tmp_path / "lora" / "result.json"]).at(time.time())] == ["lora"]


def test_file_replaced_while_it_is_opened_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "steps.jsonl", tmp_path / "other"
    path.write_text('{"step": 1}\n')
    other.write_text('{"step": 1}\n{"step": 2}\n')
    opened = Path.open

    def open_then_replace(self: Path, mode: str) -> Any:
        file = opened(self, mode)
        monkeypatch.undo()
        other.replace(path)
        return file

    monkeypatch.setattr(Path, "open", open_then_replace)
    steps = StepsFile(path)
    assert steps.new_lines() == ([{"step": 1}], True)
    assert steps.new_lines() == ([{"step": 1}, {"step": 2}], True)


def test_log_says_once_that_there_is_no_run_yet(capsys: pytest.CaptureFixture[str]) -> None:
    lines = PlainLines()
    lines.show([])
    lines.show([])
    assert capsys.readouterr().out == "no run yet\n"


def test_bad_path_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(monkeypatch, capsys, "watch", str(tmp_path / "nowhere"))
    assert code == 2
    assert "is no folder" in err


def test_live_view_on_a_terminal_ends_with_ctrl_c(tmp_path: Path) -> None:
    write_run(tmp_path / "lora")
    ours, theirs = pty.openpty()
    program = "import sys; from snell_scale.cli import main; sys.argv[0] = 'snell-scale'; main()"
    words = [sys.executable, "-c", program, "watch", str(tmp_path), "--interval", "0.2"]
    process = subprocess.Popen(words, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "150"})
    os.close(theirs)
    try:
        out = _read_until(ours, b"40/100 (40 %)")
        append(tmp_path / "lora" / "steps.jsonl", '{"step": 50, "loss": 0.1, "lr": 0.001, "total_steps": 100}\n')
        out += _read_until(ours, b"50/100 (50 %)")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert b"Traceback" not in out
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_until(descriptor: int, expected: bytes) -> bytes:
    """What comes until `expected`; the test's own time limit ends it otherwise."""
    out = b""
    while expected not in out:
        out += os.read(descriptor, 4096)
    return out
