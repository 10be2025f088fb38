"""The report's sections of methods beside the baseline, and of memory and scale."""

import re
from pathlib import Path

from scaling_runs import VIT_H, write_job
from synthetic_runs import WriteRun, memory_of

from analysis.report import write_report


def report_of(root: Path) -> str:
    return write_report([root / "study"], root / "out", title="Report").read_text(encoding="utf-8")


def section_of(text: str, identifier: str) -> str:
    return text.partition(f'<section id="{identifier}"')[2].partition("</section>")[0]


def headings_of(text: str, table: str) -> list[str]:
    head = text.partition(f'<table id="{table}"')[2].partition("</thead>")[0]
    return re.findall(r'<button type="button">([^<]*)</button>', head)


def test_methods_are_tested_against_the_baseline(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run("lora", seed, top1=90.0 + seed)
        write_run("snell", seed, top1=91.0 + 1.1 * seed)
    methods = section_of(report_of(tmp_path), "methods")
    assert {"Difference", "p (t)", "p (flips)", "Pareto"} <= set(headings_of(methods, "methods-table"))
    assert ">baseline</td>" in methods
    assert "difference from LoRA over the 3 seeds" in methods
    assert '<figure id="pareto"' in methods
    assert (tmp_path / "out" / "pareto.pdf").is_file()


def test_unlike_runs_are_not_compared_and_the_report_says_why(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0)
    write_run("snell", 0, precision="bf16")
    methods = section_of(report_of(tmp_path), "methods")
    assert "would not be fair" in methods
    assert "precision: fp32 (1 run: study/lora-seed0), bf16 (1 run: study/snell-seed0)" in methods
    assert "<table" not in methods


def test_one_method_has_nothing_beside_it(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0)
    text = report_of(tmp_path)
    assert 'id="methods"' not in text
    assert 'id="scale"' not in text


def test_memory_and_scale(write_run: WriteRun, tmp_path: Path) -> None:
    for method, peak in (("snell", 100.0), ("full", 150.0)):
        write_job(write_run, method, peak=peak, images_per_s=10)
        write_job(write_run, method, peak=peak, ranks=2, engine="ddp", images_per_s=18, wire_mib=2.0)
        write_job(write_run, method, peak=9 * peak, model=VIT_H, params=632_000_000, predicted=True)
    text = report_of(tmp_path)
    scale = section_of(text, "scale")
    for name in ("memory-parameters", "memory-savings", "memory-ranks", "scaling-speed", "communication"):
        assert f'<figure id="{name}"' in scale
        assert (tmp_path / "out" / f"{name}.pdf").is_file()
    assert "Published % (batch 8)" in headings_of(scale, "savings-table")
    assert "Efficiency %" in headings_of(scale, "scaling-table")
    assert "all-reduce MiB (calls)" in headings_of(scale, "communication-table")
    assert {"Least rank (MiB)", "Fullest rank (MiB)"} <= set(headings_of(text, "runs-table"))


def test_what_a_gpu_measures_is_in_the_table_of_runs_where_any_did(write_run: WriteRun, tmp_path: Path) -> None:
    headings = {"Allocated (MiB)", "Reserved (MiB)", "Used by NVML (MiB)", "MFU", "HFU", "Data wait (%)"}
    write_run("lora", 0)
    assert not headings & set(headings_of(report_of(tmp_path), "runs-table"))
    memory = memory_of((1.0, 2.0, 3.0, 4.0, 5.0))
    memory["peak"] |= {f"{name}_bytes": 3 * 2**29 for name in ("allocated", "reserved", "nvml_used")}
    throughput = {"images_per_s": 9.0, "data_wait_percent": 1.25}
    write_run("lora", 1, memory=memory, flops={"mfu": 0.412, "hfu": 0.5}, throughput=throughput)
    text = report_of(tmp_path)
    assert headings <= set(headings_of(text, "runs-table"))
    assert ">1,536</td>" in text
    assert ">0.412</td>" in text


def test_runs_without_environments_have_no_empty_table(write_run: WriteRun, tmp_path: Path) -> None:
    (write_run("lora", 0) / "environment.json").unlink()
    assert 'id="environment' not in report_of(tmp_path)
