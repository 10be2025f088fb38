"""Whole steps: equal factors in both implementations, complete rows, a red gate for a wrong op."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from snell_scale.bench import naive_snell
from snell_scale.bench.memory import part_bytes
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.report import RedGate
from snell_scale.bench.settings import STEP_SIDES, StepSettings
from snell_scale.bench.step import bench_step
from snell_scale.bench.step_gate import gate_step
from snell_scale.bench.step_sides import Case, adapted_layers, side_module, side_phases
from snell_scale.bench.unets import UNETS, make_unet, unet_workload
from snell_scale.bench.workloads import timm_workload
from snell_scale.tuners.snell import linear

CPU = torch.device("cpu")
MODEL = "test_vit"
SETTINGS = StepSettings(
    sides=STEP_SIDES,
    repeats=3,
    sparsity=0.9,
    device="cpu",
    dtype="float32",
    threads=1,
    seed=0,
    model=MODEL,
    batch_size=2,
    ranks=(4,),
)


@pytest.fixture(scope="module")
def case() -> Case:
    workload = timm_workload(MODEL, CPU, batch_size=2, dtype=torch.float32, seed=0)
    return Case(workload, rank=4, sparsity=0.9, device=CPU)


def test_rows_are_complete() -> None:
    findings = bench_step(SETTINGS, BenchProgress())
    assert [row.side for row in findings.rows] == list(STEP_SIDES)
    assert all(gate.passed for gate in findings.gates)
    assert len(findings.gates) == 2 * 3
    for row in findings.rows:
        assert row.case == "test_vit batch 2 r=4"
        assert (row.rounds, row.error) == (3, None)
        assert set(row.ratios) == {"probe", "lora", "full", "naive"} - {row.side}
    peaks = {row.side: row.peak_bytes or 0 for row in findings.rows}
    assert 0 < peaks["probe"] < peaks["lora"] < peaks["full"]


def test_both_implementations_start_from_the_same_model_and_factors(case: Case) -> None:
    ours, naive = side_module("snell", case), side_module("naive", case)
    pairs = list(zip(adapted_layers(ours), adapted_layers(naive), strict=True))
    base = case.workload.bundle.module
    num_blocks = len(case.workload.bundle.wrap_points)
    assert len(pairs) == 4 * num_blocks
    assert all(torch.equal(a, b) for layers in pairs for a, b in zip(*layers, strict=True))
    assert ours.training
    trained = {name for name, p in naive.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias", "blocks.0.attn.qkv.A", "blocks.0.attn.qkv.B"} <= trained
    assert len(trained) == 2 + 2 * 4 * num_blocks
    assert base.get_parameter("head.weight") is not naive.get_parameter("head.weight")


@pytest.mark.parametrize("side", STEP_SIDES)
def test_a_step_trains_and_leaves_no_gradient(case: Case, side: str) -> None:
    phases = side_phases(side, case)
    trained = [p for p in phases.module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    phases.run()
    phases.run()
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    assert all(p.grad is None for p in trained)


@pytest.mark.parametrize(
    "wrong",
    [lambda self, K: K * 0, lambda self, K: K * K.abs(), lambda self, K: 1.05 * K * K.abs() * (K.abs() > 0)],
    ids=["no delta", "no mask", "another size"],
)
def test_a_wrong_op_makes_the_gate_red(
    case: Case, wrong: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naive_snell.NaiveSnellLinear, "_sparsified", wrong)
    assert not all(gate.passed for gate in gate_step(case))
    with pytest.raises(RedGate, match="nothing was timed"):
        bench_step(replace(SETTINGS, sides=("lora", "snell")), BenchProgress())


def test_layers_that_are_wrong_only_when_they_remember_make_the_gate_red(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = linear.merge_linear

    def wrong_when_warm(
        *args: Any, threshold_memory: torch.Tensor, sparsity: float, **options: Any
    ) -> torch.Tensor:
        is_warm = bool(threshold_memory.isfinite().any())
        used = 0.8 if is_warm else sparsity
        return right(*args, threshold_memory=threshold_memory, sparsity=used, **options)

    monkeypatch.setattr(linear, "merge_linear", wrong_when_warm)
    red = {gate.name for gate in gate_step(case) if not gate.passed}
    assert "snell, warm: relative error of the factors' gradients" in red
    assert all("warm" in name for name in red)


def test_wrong_gradients_in_bfloat16_make_the_gate_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_gradient_through_the_gate(self: naive_snell.NaiveSnellLinear, K: torch.Tensor) -> torch.Tensor:
        magnitude = K.abs()
        threshold = magnitude.detach().flatten().sort().values[int(self.sparsity * (K.numel() - 1))]
        return K * torch.where(magnitude > threshold, magnitude, 0)

    workload = timm_workload(MODEL, CPU, batch_size=2, dtype=torch.bfloat16, seed=0)
    monkeypatch.setattr(naive_snell.NaiveSnellLinear, "_sparsified", with_gradient_through_the_gate)
    gates = gate_step(Case(workload, rank=4, sparsity=0.9, device=CPU))
    assert {gate.name for gate in gates if not gate.passed} == {
        f"snell{state}: relative error of the factors' gradients{within}"
        for state in ("", ", warm")
        for within in ("", " in bfloat16")
    }


def test_bfloat16_keeps_snells_factors_in_float32() -> None:
    workload = timm_workload(MODEL, CPU, batch_size=2, dtype=torch.bfloat16, seed=0)
    case = Case(workload, rank=4, sparsity=0.9, device=CPU)
    assert {factor.dtype for pair in adapted_layers(side_module("snell", case)) for factor in pair} == {
        torch.float32
    }
    assert {p.dtype for p in side_module("lora", case).parameters()} == {torch.bfloat16}
    assert all(gate.passed for gate in gate_step(case))


def test_memory_falls_back_to_the_same_after_every_step(case: Case) -> None:
    parts = part_bytes(partial(side_phases, "snell", case), CPU)
    assert list(parts) == ["forward", "backward", "step"]
    assert parts["forward"].peak > parts["step"].end
    assert parts["backward"].peak > parts["step"].end


def test_unets_have_their_published_sizes() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in make_unet(name).parameters()) for name in ("sd15", "sdxl")}
    assert sizes == {"sd15": 859_520_964, "sdxl": 2_567_463_684}


@pytest.mark.parametrize("name", ["tiny"])
def test_a_unet_adapts_every_transformer_block(name: str) -> None:
    workload = unet_workload(name, CPU, batch_size=2, num_text_tokens=4, dtype=torch.float32, seed=0)
    module = side_module("snell", Case(workload, rank=4, sparsity=0.5, device=CPU))
    blocks = sum(type(child).__name__ == "BasicTransformerBlock" for child in module.modules())
    assert len(adapted_layers(module)) == 10 * blocks > 0
    assert UNETS[name]["sample_size"] == workload.batch["sample"].shape[-1]


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer besides its head"):
        timm_workload("test_resnet", CPU, batch_size=1, dtype=torch.float32, seed=0)
