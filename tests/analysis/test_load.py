"""Run folders become rows with the right columns; what cannot be read is named and left out."""

import json
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import WriteRun

from analysis.load import load_curves, load_environments, load_runs
from snell_scale.records import write_json


def test_one_row_per_run_with_flat_columns(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("lora", 1, top1=90.0, trainable=2_500)
    (row,) = load_runs([tmp_path]).to_dict("records")
    assert row["folder"] == str(folder)
    assert (row["name"], row["status"], row["method"], row["seed"]) == ("study/lora-seed1", "ok", "lora", 1)
    assert (row["test_top1"], row["validation_top1"]) == (90.0, 91.0)
    assert (row["score"], row["validation_score"]) == (90.0, 91.0)
    assert row["trainable_percent"] == 2.5
    assert (row["peak_parameters_mib"], row["peak_temporary_mib"], row["peak_total_mib"]) == (1.0, 5.0, 15.0)
    assert (row["peak_phase"], row["phase_load_mib"], row["phase_backward_mib"]) == ("backward", 1.0, 15.0)
    assert (row["images_per_s"], row["adapter_kib"], row["seconds_total"]) == (1001.0, 10.0, 6.5)
    assert (row["varied.method.name"], row["varied.seed"]) == ("lora", 1)


def test_a_run_folder_a_study_and_their_parent_give_each_run_once(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("lora", 0)
    write_run("full", 0)
    runs = load_runs([folder, tmp_path / "study", tmp_path])
    assert sorted(runs["name"]) == ["study/full-seed0", "study/lora-seed0"]


def test_nothing_inside_a_run_folder_is_another_run(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("lora", 0)
    write_json(folder / "checkpoints" / "result.json", json.loads((folder / "result.json").read_text()))
    assert len(load_runs([tmp_path])) == 1


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schema_version": 1}',
        '{"schema_version": 99}',
        '{"schema_version": 1, "name": "x", "status": "ok", "method": "lora", "seed": 0}',
    ],
)
def test_damaged_record_is_named_and_skipped(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    write_run("lora", 0)
    (write_run("lora", 1) / "result.json").write_text(content)
    assert list(load_runs([tmp_path])["seed"]) == [0]
    assert "lora-seed1" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["metrics", "memory", "seconds"])
def test_record_with_a_part_of_the_wrong_kind_is_skipped(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    write_run("lora", 0)
    write_run("lora", 1, **{field: "words"})
    assert list(load_runs([tmp_path])["seed"]) == [0]
    assert "lora-seed1" in capsys.readouterr().err


def test_unfinished_run_is_named(write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run("lora", 0)
    (write_run("lora", 1) / "result.json").unlink()
    assert len(load_runs([tmp_path])) == 1
    error = capsys.readouterr().err
    assert "lora-seed1" in error
    assert "not ended" in error


def test_no_run_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="snell-scale run"):
        load_runs([tmp_path])
    with pytest.raises(ValueError, match="is not a folder"):
        load_runs([tmp_path / "nowhere"])


def test_run_beside_a_comparison_is_no_part_of_it(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0)
    alone = write_run("full", 0, label="pretrain", varied={})
    runs = load_runs([tmp_path]).set_index("method")
    assert runs["compared"].to_dict() == {"lora": True, "full": False}
    named_itself = load_runs([tmp_path, alone]).set_index("method")
    assert named_itself["compared"].to_dict() == {"lora": True, "full": False}
    assert load_runs([alone])["compared"].all()


def test_run_that_ended_early_has_nan_where_nothing_was_measured(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, top1=None, status="oom", memory=None, throughput={}, adapter_bytes=None)
    (row,) = load_runs([tmp_path]).to_dict("records")
    for column in ("score", "peak_total_mib", "peak_optimizer_mib", "images_per_s", "adapter_kib"):
        assert pd.isna(row[column]), column


def test_varied_null_is_a_value(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("snell", 0, label="dense", varied={"method.sparsity": None})
    write_run("snell", 0, label="sparse", varied={"method.sparsity": 0.5})
    assert list(load_runs([tmp_path])["varied.method.sparsity"]) == ["null", 0.5]


def test_curves_hold_the_evaluations_only(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("lora", 0, curve=(50.0, 80.0))
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 30, "split": "validation", "top1": null}\n{"step": 40, "spl')
    curves = load_curves(load_runs([tmp_path]))
    assert curves[["split", "step", "value"]].values.tolist() == [
        ["validation", 10, 50.0],
        ["validation", 20, 80.0],
    ]


def test_environments_are_flat_and_may_be_missing(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("lora", 0)
    (write_run("lora", 1) / "environment.json").unlink()
    environments = load_environments(load_runs([tmp_path]))
    assert environments["packages.torch"].tolist() == ["2.13.0"]
    assert "lora-seed1" in capsys.readouterr().err
