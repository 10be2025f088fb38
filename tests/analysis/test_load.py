"""Run folders become rows with the right columns; what cannot be read is named and left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_runs import WriteRun

from analysis.load import load_curves, load_environments, load_runs
from analysis.rows import CONDITIONS
from snell_scale.records import write_json

_VERSION_1 = Path(__file__).parent / "version_1"


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


def test_record_files_are_runs_too(write_run: WriteRun, tmp_path: Path) -> None:
    files = [write_run("lora", seed) / "result.json" for seed in (0, 1, 2)][:2]
    assert list(load_runs(files)["seed"]) == [0, 1]
    assert list(load_runs([*files, tmp_path])["seed"]) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"steps\.jsonl is not a folder; give a run folder, its result\.json"):
        load_runs([files[0].with_name("steps.jsonl")])


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


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics": "words"},
        {"memory": "words"},
        {"memory": {"peak": {}, "phases": {"load": {}}}},
        {"seconds": "words"},
        {"seconds": {"total": "long"}},
        {"throughput": {"images_per_s": True}},
    ],
)
def test_record_with_a_part_of_the_wrong_kind_is_skipped(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    write_run("lora", 0)
    write_run("lora", 1, **fields)
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
    for paths in ([tmp_path, alone], [alone, tmp_path]):
        named_itself = load_runs(paths).set_index("method")
        assert named_itself["compared"].to_dict() == {"lora": True, "full": True}
    assert load_runs([alone])["compared"].all()


def test_paths_that_are_given_apart_do_not_hide_each_other(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0)
    write_run("snell", 0, study="single", varied={})
    assert load_runs([tmp_path / "study", tmp_path / "single"])["compared"].all()
    assert not load_runs([tmp_path])["compared"].all()


def test_what_was_left_out_of_the_data_is_a_column(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, skipped=("one/a.png", "b.png"))
    write_run("lora", 1, skipped=("b.png", "two/a.png"))
    write_run("lora", 2, skipped=("b.png", "c.png"))
    write_run("lora", 3)
    write_run("lora", 4, total_steps=None, status="failed")
    first, elsewhere, other, nothing, unread = load_runs([tmp_path])["skipped"]
    assert first.startswith("2 files (")
    assert first == elsewhere != other
    assert nothing == "none"
    assert pd.isna(unread)


def test_run_that_ended_early_has_nan_where_nothing_was_measured(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, top1=None, status="oom", memory=None, throughput={}, file_size=None)
    (row,) = load_runs([tmp_path]).to_dict("records")
    for column in ("score", "peak_total_mib", "peak_optimizer_mib", "images_per_s", "adapter_kib"):
        assert pd.isna(row[column]), column


def test_conditions_are_columns(write_run: WriteRun, tmp_path: Path) -> None:
    conditions = {
        "microbatch_size": 16,
        "frozen_dtype": "bf16",
        "image_size": [8, 8],
        "ema_decay": None,
        "new": "x",
    }
    write_run("lora", 0, conditions=conditions, created_at="2026-11-21T00:00:00+00:00", predicted=True)
    (row,) = load_runs([tmp_path]).to_dict("records")
    known = {"microbatch_size": 16, "frozen_dtype": "bf16", "image_size": "[8, 8]", "new": "x"}
    assert {name: row[name] for name in known} == known
    assert (row["created_at"], row["predicted"]) == ("2026-11-21T00:00:00+00:00", True)
    assert all(pd.isna(row[name]) for name in CONDITIONS if name not in known)


def test_ranks_devices_communication_and_flops(write_run: WriteRun, tmp_path: Path) -> None:
    mib = 2**20
    peak = {"total_bytes": 9 * mib, "allocated_bytes": 9 * mib, "reserved_bytes": 12 * mib, "phase": "backward"}
    ranks = [{"rank": 0, "peak": peak}, {"rank": 1, "peak": {"total_bytes": 7 * mib}}]
    memory = {"phases": {}, "peak": {**peak, "nvml_used_bytes": None}, "ranks": ranks}
    flops = {"model_flops": 10**12, "mfu": 0.25, "hfu": 0.5}
    write_run("lora", 0, memory=memory, flops=flops, communication={"wire_bytes_per_rank": 12_345})
    write_run("lora", 1)
    two_ranks, alone = load_runs([tmp_path]).to_dict("records")
    assert (two_ranks["rank_peak_min_mib"], two_ranks["rank_peak_max_mib"]) == (7, 9)
    assert (two_ranks["allocated_mib"], two_ranks["reserved_mib"]) == (9, 12)
    assert pd.isna(two_ranks["nvml_used_mib"])
    assert (two_ranks["model_flops"], two_ranks["mfu"], two_ranks["hfu"]) == (10**12, 0.25, 0.5)
    assert two_ranks["wire_bytes_per_rank"] == 12_345
    assert (alone["rank_peak_min_mib"], alone["rank_peak_max_mib"]) == (15, 15)
    assert all(pd.isna(alone[name]) for name in ("allocated_mib", "mfu", "model_flops", "wire_bytes_per_rank"))


def test_record_of_schema_version_1_is_upgraded(tmp_path: Path) -> None:
    """A run of two ranks as the last release with that version wrote it."""
    shutil.copytree(_VERSION_1, tmp_path / "runs")
    (row,) = load_runs([tmp_path / "runs"]).to_dict("records")
    assert (row["name"], row["score"], row["world_size"]) == ("two-ranks", 33.6, 2)
    assert (row["num_trainable_params"], row["num_total_params"], row["file_size"]) == (2_355, 7_011, 12_176)
    assert row["rank_peak_min_mib"] == row["rank_peak_max_mib"] == row["peak_total_mib"] == 301_992 / 2**20
    assert row["peak_temporary_mib"] == 41_096 / 2**20
    assert all(pd.isna(row[f"peak_{name}_mib"]) for name in ("transients", "communication", "unexplained"))
    known = {"gradient_accumulation": 1, "activation_checkpointing": False, "ema_decay": 0.9, "data_seed": 0}
    known |= {"frozen_dtype": "fp32", "compile": False, "deterministic": False}
    assert {name: row[name] for name in known} == known
    assert all(pd.isna(row[name]) for name in CONDITIONS if name not in known)
    assert row["predicted"] is False
    assert row["wire_bytes_per_rank"] == 9_420


def test_record_of_schema_version_1_without_its_config_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(_VERSION_1, folder)
    (folder / "two-ranks" / "config.yaml").unlink()
    (row,) = load_runs([folder]).to_dict("records")
    assert row["score"] == 33.6
    assert all(pd.isna(row[name]) for name in CONDITIONS)


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


def test_many_missing_environments_are_one_line(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        (write_run("lora", seed) / "environment.json").unlink()
    assert load_environments(load_runs([tmp_path])).empty
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no environment: 3 of 3 runs, first ")
    assert line.endswith("lora-seed0/environment.json: No such file or directory")
