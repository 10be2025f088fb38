"""Scaling over ranks, communication, and all that memory_scaling writes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scaling_runs import VIT_H, with_ranks, write_job
from synthetic_runs import WriteRun

from analysis.drawing import WIDTH_INCHES
from analysis.load import load_runs
from analysis.memory_scaling import main, write_memory_scaling
from analysis.scaling.cases import scaling_cases
from analysis.scaling.figures import memory_against_parameters
from analysis.scaling.predictions import prediction_sentences, predictions
from analysis.scaling.ranks import rank_scaling, scaling_sentences
from analysis.scaling.traffic import traffic, traffic_sentences

_CONDITIONS = {"image_size": [224, 224], "compile": False, "fused_attention": True}


def scaling_of(root: Path) -> pd.DataFrame:
    return rank_scaling(scaling_cases(load_runs([root])))


@pytest.fixture
def jobs(write_run: WriteRun, tmp_path: Path) -> Path:
    """SNELL on 1, 2 and 4 ranks at global batch 8 (strong) and 8 per rank (weak), and one job of neither."""
    write_job(write_run, "snell", peak=100, images_per_s=10)
    write_job(write_run, "snell", peak=80, engine="ddp", ranks=2, images_per_s=18)
    write_job(write_run, "snell", peak=70, engine="ddp", ranks=4, images_per_s=28)
    write_job(write_run, "snell", peak=100, engine="ddp", ranks=2, batch=16, images_per_s=19)
    write_job(write_run, "snell", peak=101, engine="ddp", ranks=4, batch=32, images_per_s=36)
    write_job(write_run, "snell", peak=90, engine="ddp", ranks=4, batch=12, images_per_s=30)
    return tmp_path


def test_strong_and_weak_series_and_what_is_neither(jobs: Path) -> None:
    table = scaling_of(jobs)
    found = {
        kind: list(zip(rows["world_size"], rows["batch_size"], rows["efficiency_percent"].round(1), strict=True))
        for kind, rows in table.groupby("series")
    }
    assert found["strong"] == [(1, 8, 100.0), (2, 8, 90.0), (4, 8, 70.0)]
    assert found["weak"] == [(1, 8, 100.0), (2, 16, 95.0), (4, 32, 90.0)]
    assert [row[:2] for row in found["neither"]] == [(4, 12)]
    assert set(table.loc[table["series"] != "neither", "base"]) == {"single, 1 rank"}
    told = "\n".join(scaling_sentences(table))
    assert told.index("share its cores") < told.index("images/s per rank")  # before a number that it limits
    assert "Strong scaling (equal global batch) on ddp: images/s per rank on the most ranks (4)" in told
    assert "SNELL 70 %" in told
    assert "Neither strong nor weak scaling" in told
    assert "SNELL on ddp with 4 ranks and batch 12." in told


def test_an_engine_with_a_one_rank_job_of_its_own_is_measured_by_it(write_run: WriteRun, tmp_path: Path) -> None:
    write_job(write_run, "snell", peak=100, images_per_s=10)
    write_job(write_run, "snell", peak=100, engine="ddp", images_per_s=8)
    write_job(write_run, "snell", peak=60, engine="ddp", ranks=2, images_per_s=12)
    table = scaling_of(tmp_path)
    assert list(table["base"]) == ["ddp, 1 rank"] * 2
    assert list(table["efficiency_percent"]) == [100, 75]


def test_two_weak_series_of_one_engine_stay_apart(write_run: WriteRun, tmp_path: Path) -> None:
    """(2 ranks, batch 16) and (2, 8) start with the batches of each other's."""
    for ranks, batch, speed in ((1, 8, 10.0), (2, 16, 18.0), (2, 8, 16.0), (4, 16, 29.76)):
        write_job(write_run, "snell", peak=50.0, ranks=ranks, batch=batch, engine="ddp", images_per_s=speed)
    table = scaling_of(tmp_path)
    weak = table.loc[table["series"] == "weak"]
    sizes = {tuple(series["world_size"]) for _, series in weak.groupby("series_key")}
    assert sizes == {(1, 2), (2, 4)}
    (told,) = [text for text in scaling_sentences(table) if "images/s" in text and text.startswith("Weak")]
    assert "SNELL 90 to 93 %" in told


def test_jobs_that_differ_otherwise_are_no_series(write_run: WriteRun, tmp_path: Path) -> None:
    write_job(write_run, "snell", peak=100, engine="ddp", images_per_s=10)
    write_job(write_run, "snell", peak=60, engine="ddp", ranks=2, images_per_s=12, precision="bf16")
    write_job(write_run, "lora", peak=60, engine="ddp", ranks=2, images_per_s=12)
    table = scaling_of(tmp_path)
    assert table.empty
    assert "No two runs differ in the number of ranks" in scaling_sentences(table)[0]


def test_predicted_memory_over_ranks_is_called_predicted(write_run: WriteRun, tmp_path: Path) -> None:
    for ranks, peak in ((1, 1000.0), (8, 400.0), (1024, 250.0)):
        engine = "single" if ranks == 1 else "fsdp2"
        write_job(write_run, "full", peak=peak, engine=engine, ranks=ranks, batch=8 * ranks, predicted=True)
    table = scaling_of(tmp_path)
    assert set(table["series"]) == {"weak"}
    assert table["efficiency_percent"].isna().all()
    assert scaling_sentences(table) == [
        "Weak scaling (equal batch per rank) on fsdp2: the peak of the fullest of 1024 ranks is predicted to "
        "come to, of what the smallest job needs per rank: full fine-tuning 25 %."
    ]


def test_communication_by_operation_and_beside_full_fine_tuning(write_run: WriteRun, tmp_path: Path) -> None:
    for method, wire in (("snell", 2.0), ("full", 100.0)):
        write_job(write_run, method, peak=100, engine="ddp", ranks=2, wire_mib=wire)
    write_job(write_run, "snell", peak=100)
    table = traffic(scaling_cases(load_runs([tmp_path])))
    snell = table.loc[table["method"] == "snell"].iloc[0]
    assert (len(table), snell["wire_mib"], snell["payload_mib"]) == (2, 2, 3)
    assert (snell["all_reduce_mib"], snell["all_reduce_calls"], snell["broadcast_mib"]) == (2, 3, 1)
    assert traffic_sentences(table)[0] == (
        "On ddp with 2 ranks a rank sends per step, in MiB: SNELL 2 (2 % of full fine-tuning's), "
        "full fine-tuning 100."
    )


def test_predictions_are_checked_against_what_was_measured(write_run: WriteRun, tmp_path: Path) -> None:
    write_job(write_run, "snell", peak=100, conditions={**_CONDITIONS, "hardware": "a processor"})
    write_job(write_run, "snell", peak=102, conditions={**_CONDITIONS, "target": "cpu"}, predicted=True)
    write_job(write_run, "lora", peak=200)
    write_job(write_run, "lora", peak=190, predicted=True)
    table = predictions(scaling_cases(load_runs([tmp_path])))
    assert table.set_index("method")["error_percent"].to_dict() == pytest.approx({"snell": 2, "lora": -5})
    assert prediction_sentences(table) == [
        "Predicted against measured peaks of 2 jobs: off by -5.00 to +2.00 %, 3.50 % on average."
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "bf16"},
        {"memory": with_ranks([10.0]) | {"device": "cuda:0"}},
        {"batch": 16},
        {"r": 32},
        {"conditions": {**_CONDITIONS, "image_size": [384, 384]}},
        {"conditions": {**_CONDITIONS, "ema_decay": 0.999}},
        {"conditions": {**_CONDITIONS, "compile": True}},
        {"conditions": {**_CONDITIONS, "fused_attention": False}},
        {"sparsity": 0.9},
        {"sparsity": None},
    ],
    ids=str,
)
def test_a_prediction_of_another_job_checks_nothing(
    other: dict[str, Any], write_run: WriteRun, tmp_path: Path
) -> None:
    job = {"conditions": _CONDITIONS, "sparsity": 0.5}
    write_job(write_run, "snell", peak=100, **job)
    write_job(write_run, "snell", peak=90, predicted=True, **{**job, **other})
    table = predictions(scaling_cases(load_runs([tmp_path])))
    assert table.empty
    assert "nothing here checks the predictions" in prediction_sentences(table)[0]


def test_everything_is_written(jobs: Path, write_run: WriteRun, tmp_path: Path) -> None:
    for method, peak in (("lora", 95.0), ("gps", 150.0), ("full", 190.0)):
        write_job(write_run, method, peak=peak)
        write_job(write_run, method, peak=10 * peak, model=VIT_H, params=632_000_000, predicted=True)
    write_job(write_run, "snell", peak=90_000, model="eva_8b", params=7_500_000_000, predicted=True, status="oom")
    write_job(write_run, "snell", peak=1000, model=VIT_H, params=632_000_000, predicted=True)
    write_job(write_run, "snell", peak=70, engine="fsdp2", ranks=2, wire_mib=3.0)
    write_job(write_run, "snell", peak=102, predicted=True)
    output = tmp_path / "out"
    written = write_memory_scaling(load_runs([jobs]), output)
    figures = ("memory-parameters", "memory-savings", "memory-ranks", "scaling-speed", "communication")
    tables = ("memory", "predictions", "savings", "savings-published", "scaling", "communication")
    expected = {f"{name}.{suffix}" for name in figures for suffix in ("png", "pdf")} | {"summary.md"}
    expected |= {f"{name}.{suffix}" for name in tables for suffix in ("md", "csv", "tex")}
    assert {path.name for path in written} == expected
    for name in figures:
        with Image.open(output / f"{name}.png") as image:
            assert image.width == round(200 * WIDTH_INCHES)
        assert (output / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    summary = (output / "summary.md").read_text()
    assert "10 measured, 6 predicted by `snell-scale estimate` (nothing ran)" in summary
    assert (
        "Cases predicted to run out of memory: 1. SNELL, eva_8b on single with 1 rank, batch 8 (87.9 GiB"
        in summary
    )
    memory = (output / "memory.md").read_text()
    assert "| predicted | oom" in memory
    table = pd.read_csv(output / "memory.csv")
    assert "setting" not in table
    assert len(table) == 16


def test_figures_tell_predicted_points_from_measured_ones(write_run: WriteRun, tmp_path: Path) -> None:
    write_job(write_run, "snell", peak=2048)
    write_job(write_run, "snell", peak=8192, model=VIT_H, params=632_000_000, predicted=True)
    picture = memory_against_parameters(scaling_cases(load_runs([tmp_path])))
    assert picture is not None
    assert (
        "SNELL vit_base_patch16_224.augreg_in21k 2 GiB, SNELL vit_huge_patch14_224 8 GiB predicted" in picture.alt
    )
    lines = [line for line in picture.draw().axes[0].get_lines() if np.size(line.get_xdata())]
    fills = [line.get_markerfacecolor() for line in lines]
    assert sorted(fill == "none" for fill in fills) == [False, True]


def test_the_command_line(jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(jobs), "--output", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "summary.md") in capsys.readouterr().out


def test_runs_without_memory_are_refused(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("snell", 0, memory=None, status="failed")
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "none of these runs has a measured or predicted peak" in capsys.readouterr().err


def test_a_job_without_times_has_no_efficiency(write_run: WriteRun, tmp_path: Path) -> None:
    write_job(write_run, "snell", peak=100, images_per_s=10)
    write_job(write_run, "snell", peak=80, engine="ddp", ranks=2)
    assert [math.isnan(value) for value in scaling_of(tmp_path)["efficiency_percent"]] == [False, True]
