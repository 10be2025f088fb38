"""The engines' benchmark: rows are what the runs' records say; who cannot run, or trains otherwise, has none."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from analysis.bench import bench_columns, load_benches
from analysis.load import rows_of
from snell_scale.attempt import blank_result
from snell_scale.bench import engine_runs, engines
from snell_scale.bench.engine_runs import finished_run
from snell_scale.bench.engines import bench_engines
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.settings import EnginesSettings
from snell_scale.bench_records import BenchRecord, Row, read_bench, write_bench
from snell_scale.config import Config
from snell_scale.engines.deepspeed_config import DeepSpeedConfig
from snell_scale.records import Result
from tests.bench.test_bench_records import made_record
from tests.command_line import call

SETTINGS = EnginesSettings(
    engines=("single", "ddp", "zero2"),
    processes=(1, 2),
    model="test_vit",
    depth=1,
    image_size=32,
    batch_size=4,
    method="snell",
    rank=4,
    sparsity=0.5,
    steps=8,
    repeats=2,
    device="cpu",
    threads=2,
    seed=0,
)
TINY = ("--model", "test_vit", "--depth", "1", "--image-size", "32", "--batch-size", "4", "--steps", "8")
TINY = ("bench", "engines", *TINY, "--threads", "2", "--repeats", "1")
CASE = "test_vit depth 1 32x32 batch 4 snell"
SIDES = ["single", "ddp x1", "zero2 x1", "ddp x2", "zero2 x2"]


class MadeRuns:
    """In place of processes: writes the losses and returns the result that a run of the cell would leave."""

    def __init__(
        self, *, losses: Mapping[str, float] | None = None, failing: Mapping[str, str] | None = None
    ) -> None:
        self.started: list[str] = []
        self._losses, self._failing = losses or {}, failing or {}

    def __call__(self, config: Config, processes: int, folder: Path, *, threads: int) -> Result:
        self.started.append(config.name)
        if config.name in self._failing:
            raise ValueError(self._failing[config.name])
        (folder / config.name).mkdir(exist_ok=True)
        lines = [
            {"step": 1, "lr": 1.0, "loss": 2.0},
            {"step": 2, "lr": 1.0, "loss": self._losses.get(config.name, 1.0)},
        ]
        (folder / config.name / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        number = len(self.started)
        return replace(
            blank_result(config, {}, world_size=processes),
            status="ok",
            throughput={"step_ms_median": 10.0 * number, "images_per_s": 1.0 * number},
            memory={"peak": {"total_bytes": 1000 * processes}},
            num_trainable_params=25,
            communication={"payload_bytes": 104, "wire_bytes_per_rank": 103} if processes > 1 else None,
        )


def test_the_cells_take_turns_and_rows_hold_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = MadeRuns()
    monkeypatch.setattr(engines, "finished_run", runs)
    rows = bench_engines(SETTINGS, BenchProgress()).rows
    in_order = ["single-1", "ddp-1", "zero2-1", "ddp-2", "zero2-2"]
    assert runs.started == [*in_order, *in_order[1:], in_order[0]]
    assert [(row.case, row.side) for row in rows] == [(CASE, side) for side in SIDES]
    single, two = rows[0], rows[3]
    assert (single.rounds, single.median_ms, single.peak_bytes) == (2, (10 + 100) / 2, 1000)
    assert single.figures == {"processes": 1, "images_per_s": 5.5, "gradient_bytes": 100}
    assert (two.rounds, two.median_ms, two.peak_bytes) == (2, (40 + 80) / 2, 2000)
    assert two.figures == {
        "processes": 2,
        "images_per_s": 6.0,
        "gradient_bytes": 100,
        "payload_bytes": 104,
        "wire_bytes_per_rank": 103,
    }
    # Round by round: 40 over 10, then 80 over 100.
    assert two.ratios["single"]["median"] == pytest.approx((4 + 0.8) / 2)


def test_the_table_shows_what_was_communicated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "finished_run", MadeRuns())
    rows = bench_engines(SETTINGS, BenchProgress()).rows
    write_bench(tmp_path, made_record(rows=tuple(rows)))
    assert list(read_bench(tmp_path).rows) == rows
    table = load_benches([tmp_path])
    assert table["wire_bytes_per_rank"].tolist()[3:] == [103, 103]
    cells = {column.heading: [column.text(row) for row in rows_of(table)] for column in bench_columns(table)}
    assert cells["Images/s"][0] == "5.5"
    assert cells["× single"] == ["–", *(f"{row.ratios['single']['median']:.2f}" for row in rows[1:])]
    assert cells["Payload MiB"] == ["–", "–", "–", "0.00", "0.00"]


def test_an_engine_that_cannot_run_has_a_row_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(config: DeepSpeedConfig) -> None:
        raise ValueError("it is not installed")

    monkeypatch.setattr(DeepSpeedConfig, "check", missing)
    runs = MadeRuns(failing={"fsdp2-2": "failed: no such collective"})
    monkeypatch.setattr(engines, "finished_run", runs)
    code, out, _ = call(
        monkeypatch, capsys, *TINY, "--engines", "single,fsdp2,zero3", "--repeats", "2", "--output", str(tmp_path)
    )
    assert code == 1
    rows = {row.side: row for row in read_bench(tmp_path).rows}
    assert list(rows) == ["single", "fsdp2 x1", "zero3 x1", "fsdp2 x2", "zero3 x2"]
    assert runs.started == ["single-1", "fsdp2-1", "fsdp2-2", "fsdp2-1", "single-1"]
    assert {side: row.error for side, row in rows.items() if row.error} == {
        "zero3 x1": "it is not installed",
        "zero3 x2": "it is not installed",
        "fsdp2 x2": "failed: no such collective",
    }
    assert rows["fsdp2 x2"].median_ms is None
    assert "no such collective" in " ".join(out.split())


def test_who_trains_otherwise_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the first loss, 2: 1 % apart, and a tenth of the limit.
    monkeypatch.setattr(engines, "finished_run", MadeRuns(losses={"ddp-2": 1.02, "zero2-2": 1.0002}))
    findings = bench_engines(SETTINGS, BenchProgress())
    rows = {row.side: row for row in findings.rows}
    assert rows["ddp x2"].median_ms is None
    assert "trains otherwise than single" in (rows["ddp x2"].error or "")
    assert rows["zero2 x2"].error is None
    assert [gate.name.split(":")[0] for gate in findings.gates if not gate.passed] == ["ddp x2"]
    assert len(findings.gates) == len(SIDES) - 1


def test_ctrl_c_keeps_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = MadeRuns()

    def interrupted(*args: Any, **options: Any) -> Result:
        if len(runs.started) == len(SIDES) + 2:
            raise KeyboardInterrupt
        return runs(*args, **options)

    monkeypatch.setattr(engines, "finished_run", interrupted)
    findings = engines.Findings()
    with pytest.raises(KeyboardInterrupt):
        bench_engines(SETTINGS, BenchProgress(), findings)
    assert [(row.side, row.rounds, row.error) for row in findings.rows] == [(side, 1, None) for side in SIDES]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engines", "sinlge,ddp"), "did you mean 'single'"),
        (("--engines", ","), "--engines is empty"),
        (("--engines", "ddp,ddp"), "name each once"),
        (("--processes", "0,1"), "--processes has 0"),
        (("--processes", "-1"), "--processes has -1"),
        (("--processes", "one"), "expected whole numbers"),
        (("--processes", "3"), "does not divide among 3 processes"),
        (("--engines", "single", "--processes", "2"), "that engine is one process"),
        (("--method", "snel"), "did you mean 'snell'"),
        (("--device", "cuda:1"), "expected cpu or cuda"),
        (("--model", "vit_smal_patch16_224"), "did you mean vit_small_patch16_224"),
        (("--image-size", "50"), "patches do not divide"),
        (("--batch-size", "400"), "of 340 images"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = MadeRuns()
    monkeypatch.setattr(engines, "finished_run", runs)
    code, _, err = call(monkeypatch, capsys, "bench", "engines", *arguments)
    assert code == 2
    assert message in err
    assert runs.started == []


def measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> BenchRecord:
    code, out, _ = call(monkeypatch, capsys, *TINY, *arguments, "--output", str(tmp_path))
    assert code == 0, out
    record = read_bench(tmp_path)
    assert all(row.median_ms and row.peak_bytes and row.figures["images_per_s"] > 0 for row in record.rows)
    return record


def test_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = measured(tmp_path, monkeypatch, capsys, "--engines", "ddp", "--processes", "2").rows
    assert row.side == "ddp x2"
    assert_exchanges_its_gradients(row)


def assert_exchanges_its_gradients(row: Row) -> None:
    """DDP: every gradient once; in a ring of two a rank sends as much as that."""
    assert row.figures["payload_bytes"] == row.figures["wire_bytes_per_rank"] == row.figures["gradient_bytes"]


@pytest.mark.slow
def test_every_engine_on_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = "ddp,fsdp2,zero1,zero2,zero3"
    record = measured(tmp_path, monkeypatch, capsys, "--engines", engines, "--processes", "2")
    rows = {row.side: row for row in record.rows}
    assert list(rows) == [f"{engine} x2" for engine in engines.split(",")]
    assert [gate.passed for gate in record.gates] == [True] * 4
    assert_exchanges_its_gradients(rows["ddp x2"])
    # Whole weights travel where they are sharded, frozen ones too.
    for side in ("fsdp2 x2", "zero3 x2"):
        assert rows[side].figures["payload_bytes"] > 2 * rows["ddp x2"].figures["payload_bytes"]


@pytest.mark.slow
def test_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = measured(tmp_path, monkeypatch, capsys, "--engines", "single,zero3", "--processes", "1")
    assert [row.side for row in record.rows] == ["single", "zero3 x1"]
    assert not any("payload_bytes" in row.figures for row in record.rows)
    assert record.rows[1].ratios["single"]["median"] > 0


def test_a_run_that_hangs_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_runs, "_LIMIT_SECONDS", 2.0)
    with pytest.raises(ValueError, match="took longer than 2 s"):
        finished_run(engines._config(SETTINGS, "ddp", 2), 2, tmp_path, threads=1)
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(tmp_path) in command]


def test_a_failed_run_speaks_for_itself(tmp_path: Path) -> None:
    config = engines._config(SETTINGS, "single", 1)
    model = config.model.model_copy(update={"weights": "nowhere.safetensors"})
    with pytest.raises(ValueError, match=r"error: model\.weights: there is no file nowhere\.safetensors"):
        finished_run(config.model_copy(update={"model": model}), 1, tmp_path, threads=1)
