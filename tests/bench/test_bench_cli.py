"""`snell-scale bench` as a user meets it: records, tables, exit codes, and what it refuses before building."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from snell_scale.bench import gpu, step_gate
from snell_scale.bench_records import read_bench
from snell_scale.kernels.merge import cpu_products
from tests.command_line import call

LAYER = (
    "bench",
    "merge",
    "--shape",
    "24x40",
    "--shape",
    "16x12",
    "--tokens",
    "6",
    "--rank",
    "4",
    "--repeats",
    "3",
)
SMALL = ("bench", "gpu", "--device", "cpu", "--small")


def test_merge_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "layers"
    options = ("--sides", "lora, snell", "--threads", "1", "--output", str(output))
    code, out, _ = call(monkeypatch, capsys, *LAYER, *options)
    assert code == 0
    record = read_bench(output)
    assert (record.command, record.name, record.dtype, record.num_threads) == (
        "bench merge",
        "layers",
        "float32",
        1,
    )
    assert [(row.case, row.side) for row in record.rows] == [
        (case, side) for case in ("24→40 r=4", "16→12 r=4") for side in ("lora", "snell")
    ]
    assert record.settings["sides"] == ["lora", "snell"]
    assert record.environment["packages"]["torch"] == torch.__version__
    assert record.hardware.endswith("1 threads")
    assert record.seconds is not None
    assert "gates: 20 of 20 green" in out
    assert f"Record: {output}/bench.json" in out
    assert "16→12 r=4: checking against the reference" in out


def test_step_takes_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", "test_vit", "--batch-size", "2", "--rank", "2", "--rank", "4", "--sides", "probe,snell")
    monkeypatch.chdir(tmp_path)
    code, _, _ = call(monkeypatch, capsys, "bench", "step", *options, "--repeats", "3")
    assert code == 0
    (folder,) = (tmp_path / "runs" / "bench").iterdir()
    record = read_bench(folder)
    assert folder.name.startswith("step-")
    assert [row.case for row in record.rows] == ["test_vit batch 2 r=2"] * 2 + ["test_vit batch 2 r=4"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merge", "--sides", "frzen"), "did you mean 'frozen'"),
        (("merge", "--sides", ","), "--sides is empty"),
        (("merge", "--shape", "3by4"), "expected INxOUT"),
        (("merge", "--shape", "0x4"), "expected INxOUT"),
        (("merge", "--rank", "7"), "expected an even number"),
        (("merge", "--rank", "64", "--shape", "32x99"), "larger than the smallest side of a shape, 32"),
        (("merge", "--sparsity", "1"), "a share of zeros in [0, 1)"),
        (("merge", "--dtype", "float16"), "did you mean 'bfloat16'"),
        (("merge", "--implementation", "trtion"), "did you mean 'triton'"),
        (("merge", "--device", "tpu"), "expected cpu, cuda or cuda:N"),
        (("step", "--sides", "frozen"), "--sides has 'frozen'"),
        (("step", "--model", "vit_bas_patch16_224"), "did you mean vit_base_patch16_224"),
        (("step", "--rank", "0"), "expected an even number"),
        (("gpu", "--items", "steps,kernel"), "did you mean 'kernels'"),
        (("gpu", "--device", "cpu"), "add --small"),
        (("gpu", "--items", ","), "--items is empty; valid: kernels, steps, unets, layers"),
        (("gpu", "--implementation", "torch"), "but steps and unets run whole models"),
        (("gpu", "--items", "layers,unets", "--implementation", "torch"), "give --items kernels,layers"),
        (("merge", "--sides", "snell-mkl", "--dtype", "bfloat16"), "libraries on CPU in float32"),
        (("step", "--sides", "snell-mkl", "--device", "cuda"), "libraries on CPU in float32"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(monkeypatch, capsys, "bench", *arguments)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("arguments", [("gpu",), ("merge", "--device", "cuda"), ("step", "--device", "cuda:3")])
def test_a_missing_gpu_is_refused(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call(monkeypatch, capsys, "bench", *arguments)
    assert code == 2
    assert "this machine shows 0 CUDA device(s)" in err


def test_a_red_gate_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from snell_scale.bench.merge_gate import LIMITS

    monkeypatch.setitem(LIMITS, torch.float32, 1e-12)
    code, _, err = call(monkeypatch, capsys, *LAYER, "--output", str(tmp_path / "red"))
    assert code == 2
    assert "the gate of correctness is red, so nothing was timed" in err
    assert not (tmp_path / "red").exists()


def test_triton_that_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for command in (LAYER[1:], (*SMALL[1:], "--items", "layers")):
        code, out, err = call(monkeypatch, capsys, "bench", *command, "--implementation", "triton")
        assert code == 2
        assert "--implementation is 'triton'" in err
        assert out == ""


@pytest.mark.parametrize("has_onednn", [True, False])
def test_the_rows_say_which_library_multiplies(
    has_onednn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_products, "_prefers_onednn", lambda: has_onednn)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    step = ("bench", "step", "--model", "test_vit", "--batch-size", "2", "--repeats", "3")
    for command in ((*LAYER[:2], "--shape", "24x40", *LAYER[6:]), step):
        code, out, _ = call(monkeypatch, capsys, *command, "--output", str(tmp_path))
        assert code == 0
        rows = {row.side: row for row in read_bench(tmp_path).rows}
        assert ("snell-mkl" in rows) == has_onednn
        library = "oneDNN" if has_onednn else "MKL"
        assert (rows["snell"].note or "").endswith(f"products by {library}")
        assert f"products by {library}" in " ".join(out.split())
        assert all("products by" in (row.note or "") for side, row in rows.items() if side.startswith("snell"))
        assert not any("products by" in (rows[side].note or "") for side in ("lora", "full", "naive"))
        if has_onednn:
            assert (rows["snell-mkl"].note or "").endswith("products by MKL")
            assert rows["snell-mkl"].rounds == rows["snell"].rounds


def test_the_gpu_set_at_small_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, *SMALL, "--output", str(tmp_path))
    assert code == 0
    record = read_bench(tmp_path)
    cases = list(dict.fromkeys(row.case for row in record.rows))
    assert cases == ["kernels 24→40 r=8", "test_vit batch 2 r=8", "tiny batch 2 r=8", "24→40 r=8"]
    assert len(record.aims) == 4 + 4 + 4
    assert all(aim.value is not None and aim.value > 0 for aim in record.aims)
    assert out.rindex("Aims") > out.rindex("gates:")
    ours = next(row for row in record.rows if row.case.startswith("test_vit") and row.side == "snell")
    step_aims = {aim.what: aim.value for aim in record.aims if aim.case == ours.case}
    assert step_aims["step / LoRA"] == ours.ratios["lora"]["median"]
    assert step_aims["times faster than naive SNELL"] == pytest.approx(1 / ours.ratios["naive"]["median"])


def test_a_failed_item_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu, "kernel_rows", without_memory)
    monkeypatch.setitem(step_gate._GRADIENT_LIMITS, torch.float32, -1.0)
    code, out, err = call(
        monkeypatch, capsys, *SMALL, "--items", "kernels,steps,layers", "--output", str(tmp_path)
    )
    assert code == 1
    assert "no memory" in err
    record = read_bench(tmp_path)
    failed = [row for row in record.rows if row.error]
    assert [row.case for row in failed] == ["kernels 24→40 r=8", "test_vit batch 2 r=8"]
    assert "gate of correctness is red" in (failed[1].error or "")
    assert all(row.median_ms for row in record.rows if not row.error)
    assert all(aim.reached is None and aim.note for aim in record.aims)
    assert "not measured" in out


def test_items_that_find_no_time_left_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_SMALL", replace(gpu._SMALL, total_budget_s=-1))
    code, _, _ = call(monkeypatch, capsys, *SMALL, "--output", str(tmp_path))
    assert code == 1
    assert all("used up" in (row.error or "") for row in read_bench(tmp_path).rows)


def test_triton_by_name_through_its_interpreter(tmp_path: Path) -> None:
    command = ("-m", "snell_scale.cli", *SMALL, "--items", "kernels,layers", "--implementation", "triton")
    done = subprocess.run(
        [sys.executable, *command, "--threads", "1", "--output", str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "profiler_start" not in done.stderr
    record = read_bench(tmp_path)
    assert all(gate.passed for gate in record.gates)
    assert len(record.gates) == 15
    assert all(row.median_ms for row in record.rows)
