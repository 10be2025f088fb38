"""Run records: atomic writing, reading back, and damage that is named."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from snell_scale.records import Result, StepWriter, read_result, read_steps, write_atomically, write_result


def make_result(**changes: Any) -> Result:
    fields: dict[str, Any] = {
        "name": "a", "status": "ok", "method": "snell", "model": "m", "dataset": "d", "task": "t",
        "engine": "single", "precision": "fp32", "seed": 0, "world_size": 1, "batch_size": 8,
    }  # fmt: skip
    return Result(**(fields | changes))


def test_result_reads_back(tmp_path: Path) -> None:
    write_result(tmp_path, make_result(metrics={"test": {"top1": 91.5}}))
    assert read_result(tmp_path).metrics["test"]["top1"] == 91.5


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    write_result(tmp_path, make_result(seconds={"train": math.nan}))
    assert json.loads((tmp_path / "result.json").read_text())["seconds"]["train"] is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is damaged"),
        ("[]", "schema version None"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1, "status": "fine", "name": "x", "method": "y", "seed": 0}', "status 'fine'"),
        ('{"schema_version": 1, "status": "ok"}', "missing"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=expected):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": "zero"}, "seed is 'zero', expected int"),
        ({"seed": None}, "seed is null, expected int"),
        ({"world_size": True}, "world_size is True, expected int"),
        ({"predicted": None}, "predicted is null, expected true or false"),
        ({"method": ["lora"]}, "method is ['lora'], expected text"),
        ({"reported": "top1"}, "reported is 'top1', expected a list"),
        ({"reported": [1]}, "reported.0 is 1, expected text"),
        ({"metrics": {"test": {"top1": "high"}}}, "metrics.test.top1 is 'high', expected a number"),
        ({"metrics": {"test": 3}}, "metrics.test is 3, expected a mapping"),
        ({"conditions": {"microbatch_size": "x"}}, "conditions.microbatch_size is 'x', expected a number"),
        ({"memory": []}, "memory is [], expected a mapping"),
        ({"memory": {"peak": {"total_bytes": "x"}}}, "memory.peak.total_bytes is 'x', expected a number"),
        ({"memory": {"ranks": [{"peak": None}]}}, "memory.ranks.peak is null, expected a mapping"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    write_result(tmp_path, make_result())
    path = tmp_path / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"is damaged: {re.escape(expected)}$"):
        read_result(tmp_path)


def test_a_number_that_was_not_finite_is_no_damage(tmp_path: Path) -> None:
    write_result(tmp_path, make_result(metrics={"test": {"loss": math.inf}}, throughput={"images_per_s": 3}))
    result = read_result(tmp_path)
    assert (result.metrics["test"]["loss"], result.throughput["images_per_s"]) == (None, 3)


def test_missing_result_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no result.json"):
        read_result(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_steps_of_a_resumed_run_are_not_doubled(tmp_path: Path) -> None:
    writer = StepWriter(tmp_path, keep_until_step=0)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 0.5})
    writer.close()
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a crash
    assert [line["step"] for line in read_steps(tmp_path)] == [1, 2, 3]
    writer = StepWriter(tmp_path, keep_until_step=2)
    writer.write({"step": 3, "loss": 0.25})
    writer.close()
    assert [line["loss"] for line in read_steps(tmp_path)] == [0.5, 0.5, 0.25]
