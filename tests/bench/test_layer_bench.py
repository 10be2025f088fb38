"""One layer: the baseline is the published method, the gate goes red for a wrong op, the rows are complete."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from snell_scale.bench import layer_sides, naive_snell
from snell_scale.bench.layer_sides import (
    Layer,
    MergedLinear,
    between_rounds,
    make_layer,
    side_module,
    side_phases,
)
from snell_scale.bench.memory import Phases, memory_source, part_bytes, peak_bytes
from snell_scale.bench.merge import bench_merge
from snell_scale.bench.merge_gate import gate_layer
from snell_scale.bench.naive_snell import NaiveSnellLinear
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.report import RedGate
from snell_scale.bench.settings import LAYER_SIDES, MergeSettings
from snell_scale.kernels.merge import cpu_products
from snell_scale.kernels.merge.reference import delta_weight_reference

CPU = torch.device("cpu")
SETTINGS = MergeSettings(
    sides=LAYER_SIDES,
    repeats=3,
    sparsity=0.9,
    device="cpu",
    dtype="float32",
    threads=1,
    seed=0,
    shapes=((24, 40),),
    tokens=6,
    rank=4,
    implementation="auto",
)


def small_layer(*, dtype: torch.dtype = torch.float32) -> Layer:
    return make_layer(
        (24, 40), CPU, num_tokens=6, rank=4, sparsity=0.7, dtype=dtype, implementation="auto", seed=0
    )


def test_naive_snell_is_the_reference_in_float64() -> None:
    torch.manual_seed(0)
    base = nn.Linear(10, 12, dtype=torch.float64)
    A, B = (torch.randn(3, 2, n, 2, dtype=torch.float64) for n in (10, 4))
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    naive = NaiveSnellLinear(base, A.clone(), B.clone(), sparsity=0.6)
    y = naive(x)
    y.square().sum().backward()
    A.requires_grad_()
    B.requires_grad_()
    expected = base(x) + x @ delta_weight_reference(A, B, sparsity=0.6).T
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(naive.A.grad, A.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(naive.B.grad, B.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_green_for_every_implementation(dtype: torch.dtype) -> None:
    layer = small_layer(dtype=dtype)
    gates = gate_layer("c", layer, {side: partial(side_module, side) for side in ("naive", "snell")})
    assert len(gates) == 15
    assert all(gate.passed for gate in gates), gates
    reference = replace(layer, implementation="reference")
    assert all(gate.passed for gate in gate_layer("c", reference, {"snell": partial(side_module, "snell")}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sparsity": 0.8}, "mask differs only at the threshold"),
        ({"scale": 0.1001}, "relative error of y"),
        ({"weighting": "hard"}, "relative error of dA"),
    ],
)
def test_a_wrong_op_is_not_timed(
    wrong: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = layer_sides.merge_linear
    monkeypatch.setattr(
        layer_sides, "merge_linear", lambda *args, **options: right(*args, **{**options, **wrong})
    )
    with pytest.raises(RedGate, match=f"nothing was timed.*snell: {message}"):
        bench_merge(replace(SETTINGS, sides=("lora", "snell-cold")), BenchProgress())
    assert "timing" not in capsys.readouterr().out


def test_an_op_that_is_wrong_only_when_it_remembers_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_sides.merge_linear

    def wrong_when_warm(
        *args: Any, threshold_memory: torch.Tensor, sparsity: float, **options: Any
    ) -> torch.Tensor:
        is_warm = bool(threshold_memory.isfinite().any())
        used = 0.8 if is_warm else sparsity
        return right(*args, threshold_memory=threshold_memory, sparsity=used, **options)

    monkeypatch.setattr(layer_sides, "merge_linear", wrong_when_warm)
    with pytest.raises(RedGate, match="snell, warm: mask differs only at the threshold"):
        bench_merge(replace(SETTINGS, sides=("snell",)), BenchProgress())


def test_the_side_of_the_other_library_uses_it_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    right, used = cpu_products.product, []

    def counted(*args: Any) -> torch.Tensor:
        used.append(1)
        return right(*args)

    monkeypatch.setattr(cpu_products, "product", counted)
    counts = []
    for side in ("snell", "snell-mkl", "snell"):
        side_phases(side, small_layer()).run()
        counts.append(len(used))
        used.clear()
    assert counts == [2, 0, 2]


def test_the_memory_source_says_what_is_not_counted() -> None:
    assert "inside oneDNN (copies of weights that it reorders) and numpy is not counted" in memory_source(CPU)
    assert "oneDNN" not in memory_source(torch.device("cuda"))


def test_a_wrong_baseline_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive_snell.NaiveSnellLinear, "_sparsified", lambda self, K: K * K.abs())
    with pytest.raises(RedGate, match="naive: mask differs"):
        bench_merge(SETTINGS, BenchProgress())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_complete(dtype: str) -> None:
    findings = bench_merge(replace(SETTINGS, dtype=dtype), BenchProgress())
    assert [row.side for row in findings.rows] == list(LAYER_SIDES)
    for row in findings.rows:
        assert row.error is None
        assert row.rounds == 3
        assert row.median_ms is not None
        assert row.p10_ms is not None
        assert row.p90_ms is not None
        assert row.p10_ms <= row.median_ms <= row.p90_ms
        assert row.peak_bytes is not None
        assert set(row.ratios) == {"frozen", "lora", "full", "naive"} - {row.side}


def test_factors_move_between_rounds_and_a_cold_side_forgets() -> None:
    layer = small_layer()
    module = side_module("snell", layer)
    assert isinstance(module, MergedLinear)
    module.threshold_memory.fill_(1.0)
    between_rounds("snell", module)
    moved = (module.A.detach() - layer.A).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, layer_sides.STEP_SIZE), rtol=1e-3, atol=1e-7)
    assert not module.threshold_memory.isnan().any()
    between_rounds("snell-cold", module)
    assert module.threshold_memory.isnan().all()
    frozen = side_module("frozen", layer)
    between_rounds("frozen", frozen)
    assert torch.equal(frozen.get_parameter("weight"), layer.weight)


def test_gradients_of_a_round_are_those_of_one_step() -> None:
    phases = side_phases("snell", small_layer())
    phases.run()
    first = phases.module.get_parameter("A").grad
    assert first is not None
    phases.run()
    second = phases.module.get_parameter("A").grad
    assert second is not None
    torch.testing.assert_close(second, first)


def test_peak_memory_counts_what_an_operator_does_within_itself() -> None:
    @torch.library.custom_op("snell_scale_test::wasteful", mutates_args=())
    def wasteful(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1000, dtype=torch.float32).sum() + x

    def build() -> Phases:
        module, kept = nn.Linear(10, 5, bias=False), []

        def forward() -> None:
            kept.clear()
            kept.append(torch.ones(25))

        def within() -> None:
            wasteful(torch.ones(1))

        return Phases(module, (("forward", forward), ("within", within)))

    parts = part_bytes(build, CPU)
    # The weight and what forward keeps; allocations are counted as asked for, some scalars beside.
    assert 300 <= parts["forward"].end <= 340
    assert 300 <= parts["within"].end <= 340
    assert 4300 <= parts["within"].peak <= 4400
    assert peak_bytes(build, CPU) == parts["within"].peak


def test_a_side_that_cannot_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: Layer) -> nn.Module:
        raise RuntimeError("no such operator\nsecond line")

    monkeypatch.setattr(layer_sides, "BUILDERS", {**layer_sides.BUILDERS, "shira": broken})
    rows = {row.side: row for row in bench_merge(SETTINGS, BenchProgress()).rows}
    assert rows.keys() == set(LAYER_SIDES)
    assert rows["shira"].error == "RuntimeError: no such operator"
    assert rows["shira"].median_ms is None
    assert rows["snell"].error is None
