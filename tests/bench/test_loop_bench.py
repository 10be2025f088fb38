"""The loop's benchmark: both sides train alike or nothing is timed, and what the loop adds is found."""

import time
from pathlib import Path

import pytest

from snell_scale import loop as training_loop
from snell_scale.bench import loop as bench
from snell_scale.bench.loop import bench_loop
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.report import Findings, RedGate
from snell_scale.bench.settings import LoopSettings
from snell_scale.bench_records import read_bench
from snell_scale.config import TrainingConfig
from snell_scale.engines.torch_engine import TorchEngine
from tests.command_line import call

SETTINGS = LoopSettings(
    model="test_vit",
    batch_size=2,
    method="lora",
    rank=4,
    sparsity=0.9,
    steps=2,
    repeats=3,
    device="cpu",
    threads=1,
    seed=0,
)
TINY = ("bench", "loop", "--model", "test_vit", "--batch-size", "2", "--repeats", "3", "--threads", "1")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_THIN_ROUNDS", 3)
    monkeypatch.setattr(bench, "_THIN_STEPS", 2)


@pytest.mark.parametrize("method", ["lora", "snell"])
def test_the_record(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, *TINY, "--method", method, "--output", str(tmp_path))
    assert code == 0
    record = read_bench(tmp_path)
    cases = [f"test_vit thin (48 wide, 4 patches) batch 2 {method}", f"test_vit batch 2 {method}"]
    assert [(row.case, row.side) for row in record.rows] == [
        (c, side) for c in cases for side in ("bare", "loop")
    ]
    for bare, loop in (record.rows[:2], record.rows[2:]):
        assert bare.rounds == loop.rounds == 3
        assert loop.median_ms is not None
        assert bare.median_ms is not None
        assert set(loop.ratios) == {"bare"}
        assert set(loop.figures) == {"overhead_ms", "overhead_ms_p10", "overhead_ms_p90"}
    # Bitwise on a CPU: that is the gate's limit.
    assert [(gate.value, gate.limit) for gate in record.gates] == [(0.0, 0.0)] * 4
    thin, step = record.rows[1], record.rows[2]
    assert step.median_ms is not None
    own, beside = record.aims
    assert own.value == pytest.approx(thin.figures["overhead_ms"] / step.median_ms)
    assert beside.value == pytest.approx(record.rows[3].ratios["bare"]["median"] - 1)
    assert "the loop's own time" in out


def test_a_loop_with_another_learning_rate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(step: int, total: int, training: TrainingConfig) -> float:
        return 2 * training.lr

    monkeypatch.setattr(training_loop, "learning_rate", doubled)
    assert "largest difference of a trained weight" in refusal()


def test_a_loop_that_keeps_old_gradients_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchEngine, "zero_grad", lambda engine: None)
    assert "largest difference of a trained weight" in refusal()


def test_a_loop_with_other_batches_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = training_loop.training_batches
    monkeypatch.setattr(
        training_loop, "training_batches", lambda data, **options: right(data, **{**options, "start_step": 1})
    )
    assert "relative difference of the losses" in refusal()


def refusal() -> str:
    """What the red gate says; nothing was timed."""
    findings = Findings()
    with pytest.raises(RedGate) as refused:
        bench_loop(SETTINGS, BenchProgress(), findings)
    assert findings.rows == []
    return str(refused.value)


def test_time_that_the_loop_wastes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wasted_ms = 100.0
    right = training_loop.learning_rate

    def slow(step: int, total: int, training: TrainingConfig) -> float:
        time.sleep(wasted_ms / 1000)
        return right(step, total, training)

    monkeypatch.setattr(training_loop, "learning_rate", slow)
    findings = bench_loop(SETTINGS, BenchProgress())
    # A sleep lasts at least as long. Half of it is left for bare steps of 10 ms that other work holds up: it
    # would have to do so by 50 ms in two rounds of three.
    assert findings.rows[1].figures["overhead_ms"] > wasted_ms / 2


def test_ctrl_c_leaves_the_rounds_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = training_loop.learning_rate, []

    def interrupt(step: int, total: int, training: TrainingConfig) -> float:
        calls.append(step)
        if len(calls) == 2 + 2 * 2 + 1:  # warm-up, two rounds of two steps, then in the third
            raise KeyboardInterrupt
        return right(step, total, training)

    monkeypatch.setattr(training_loop, "learning_rate", interrupt)
    assert call(monkeypatch, capsys, *TINY, "--output", str(tmp_path))[0] == 130
    record = read_bench(tmp_path)
    assert record.interrupted
    assert [(row.side, row.rounds) for row in record.rows] == [("bare", 2), ("loop", 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lor"), "did you mean 'lora'"),
        (("--method", "gps"), "--method is 'gps'"),
        (("--model", "vit_bas_patch16_224"), "did you mean vit_base_patch16_224"),
        (("--model", "resnet18"), "expected a vision transformer"),
        (("--rank", "3"), "expected an even number"),
        (("--sparsity", "1"), "a share of zeros in [0, 1)"),
        (("--device", "tpu"), "expected cpu, cuda or cuda:N"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new"
    code, _, err = call(monkeypatch, capsys, "bench", "loop", *arguments, "--output", str(output))
    assert code == 2
    assert message in err
    assert not output.exists()
