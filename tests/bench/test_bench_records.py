"""The benchmark record survives the disk, and a damaged one says what is wrong with it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from snell_scale.bench_records import Aim, BenchRecord, Gate, Row, read_bench, write_bench


def made_record(**changes: Any) -> BenchRecord:
    record = {
        "command": "bench merge",
        "name": "night",
        "created": "2026-01-01T00:00:00+00:00",
        "hardware": "a CPU, 2 threads",
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 2,
        "settings": {"rank": 8},
        "environment": {"python": "3.12"},
        "memory_source": "an allocator",
        "gates": (Gate("a", "y", 1e-7, 1e-5),),
        "rows": (
            Row("a", "lora", 3, 2.0, 1.0, 3.0, 1024),
            Row("a", "snell", 3, 4.0, 3.0, 5.0, 512, {"lora": {"median": 2.0, "p10": 1.5, "p90": 2.5}}),
            Row("a", "full", error="out of memory"),
        ),
        "aims": (Aim("a", "step / LoRA", 1.25, 2.0), Aim("a", "faster", 3.0, at_least=True)),
        "seconds": 1.5,
    }
    return BenchRecord(**(record | changes))


def test_round_trip(tmp_path: Path) -> None:
    record = made_record()
    path = write_bench(tmp_path / "night", record)
    assert path == tmp_path / "night" / "bench.json"
    assert read_bench(path) == read_bench(tmp_path / "night") == record


@pytest.mark.parametrize(
    ("aim", "reached"),
    [
        (Aim("c", "w", 1.0, 1.0), True),
        (Aim("c", "w", 1.0, 1.1), False),
        (Aim("c", "w", 3.0, 3.0, at_least=True), True),
        (Aim("c", "w", 3.0, 2.9, at_least=True), False),
        (Aim("c", "w", 3.0), None),
    ],
)
def test_aims(aim: Aim, reached: bool | None) -> None:
    assert aim.reached is reached


def test_a_gate_is_red_without_a_number(tmp_path: Path) -> None:
    assert Gate("c", "n", 1.0, 1.0).passed
    assert not Gate("c", "n", math.nan, 1.0).passed
    write_bench(tmp_path, made_record(gates=(Gate("c", "n", math.inf, 1.0),)))
    (gate,) = read_bench(tmp_path).gates
    assert gate.value is None
    assert not gate.passed


def test_damage_is_named(tmp_path: Path) -> None:
    path = write_bench(tmp_path, made_record())
    raw = json.loads(path.read_text())
    cases = [
        ("{", "damaged"),
        ("[]", "schema version None"),
        (json.dumps(raw | {"schema_version": 9}), "schema version 9, expected 1"),
        (json.dumps(raw | {"extra": 1}), r"unknown \['extra'\]"),
        (json.dumps({key: value for key, value in raw.items() if key != "device"}), r"missing \['device'\]"),
        (json.dumps(raw | {"rows": [{"case": "a"}]}), r"Row: unknown \[\], missing \['side'\]"),
        (json.dumps(raw | {"gates": ["x"]}), "Gate: unknown"),
        (json.dumps(raw | {"aims": 3}), "aims is 3, expected a list"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as raised:
            read_bench(path)
        assert str(path) in str(raised.value)
    with pytest.raises(ValueError, match="no benchmark record"):
        read_bench(tmp_path / "nothing.json")
