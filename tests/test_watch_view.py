"""How runs are shown: whole names on a narrow terminal, what was only predicted, why a record is damaged."""

import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from snell_scale.watch.states import RunState, RunStates
from snell_scale.watch.view import as_line, as_table, summary
from tests.watched_runs import append, end_run, write_run


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_a_narrow_terminal_keeps_the_names(tmp_path: Path, width: int) -> None:
    for name in ("snell-lr0.001-seed0", "a-study/of-many/long/names/lora-rank-8-sparsity-0.9"):
        folder = write_run(tmp_path / name)
        append(folder / "steps.jsonl", '{"step": 40, "split": "validation", "top1": 88.5}\n')
    console = Console(width=width)
    with console.capture() as capture:
        console.print(as_table(RunStates([tmp_path]).at(time.time())))
    out = capture.get()
    assert max(map(len, out.splitlines())) <= width
    assert "snell-lr0.001-seed0 " in out
    assert "a-study/of-many/long/nam" in out
    assert all(text in out for text in ("running", "40/100 (40 %)", "88.5"))
    assert ("1.00e-03" in out) is (width >= 160)


def test_estimates_and_damaged_records_are_said_as_such(tmp_path: Path) -> None:
    end_run(write_run(tmp_path / "estimate"))
    end_run(write_run(tmp_path / "damaged"))
    for name, change in (("estimate", {"predicted": True}), ("damaged", {"seed": "zero"})):
        path = tmp_path / name / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    states = RunStates([tmp_path]).at(time.time())
    assert as_line(states[0]).startswith("damaged: damaged, step 40")
    assert as_line(states[0]).endswith("seed is 'zero', expected int")
    assert as_line(states[1]).startswith("estimate: ok (predicted), ")
    assert summary(states) == "2 runs: 1 damaged, 1 ok (predicted)"
    console = Console(width=300)
    with console.capture() as capture:
        console.print(as_table(states))
    assert "seed is 'zero', expected int" in capture.get()


def test_line_for_a_log_has_what_is_known() -> None:
    state = RunState("a", "running", False, step=5, total_steps=10, loss=0.5, peak_bytes=2**20, seconds_left=300)
    assert as_line(state) == "a: running, step 5/10 (50 %), loss 0.5000, peak MiB 1.0, left 5 min"
    assert as_line(RunState("b", "starting", False)) == "b: starting, step 0"
