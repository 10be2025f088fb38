"""Methods side by side through the command line: numbers worked out by hand, the front, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_runs import WriteRun

from analysis.compare import main
from analysis.comparison.fairness import FIELDS

Compare = Callable[..., tuple[int, str, str]]
_SCORES = {"lora": (88.0, 90.0, 92.0), "snell": (93.0, 94.0, 95.0), "gps": (89.0, 90.0, 91.0)}


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """(exit code, stdout, stderr) of `python -m analysis.compare`, which writes to tmp_path/out."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main([str(tmp_path / "study"), "--output", str(tmp_path / "out"), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def study(write_run: WriteRun, tmp_path: Path) -> Path:
    """Three methods with three seeds: GPS takes more memory than SNELL and reaches less."""
    for method, scores in _SCORES.items():
        for seed, top1 in enumerate(scores):
            write_run(method, seed, top1=top1, peak_mib=(1, 2, 3, 4, {"lora": 5, "snell": 6, "gps": 9}[method]))
    return tmp_path


def table_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "out" / "compare.csv").set_index("label")


def test_means_intervals_and_differences(study: Path, compare: Compare) -> None:
    code, out, err = compare()
    assert (code, err) == (0, "")
    table = table_of(study)
    assert list(table.index) == ["LoRA", "SNELL", "GPS"]
    # t(0.975, 2) = 4.3027; standard deviations 2 and 1, three seeds.
    assert table["score_half"].tolist() == pytest.approx([4.9683, 2.4841, 2.4841], abs=1e-4)
    # SNELL - LoRA: 5, 4, 3; GPS - LoRA: 1, 0, -1.
    assert table["difference"].tolist()[1:] == [4, 0]
    assert table["difference_half"].iloc[1] == pytest.approx(2.4841, abs=1e-4)
    assert table["p_t"].iloc[1] == pytest.approx(0.0202, abs=1e-4)
    assert table["p_t_holm"].iloc[1] == pytest.approx(0.0404, abs=1e-4)
    assert table["p_flips"].tolist()[1:] == [0.25, 1.0]
    assert table["p_flips_holm"].tolist()[1:] == [0.5, 1.0]
    assert "94.0 ± 2.5" in out
    assert "+4.0 ± 2.5" in out
    assert "3 seeds: the smallest p of a sign-flip test is 0.25, corrected 0.5; for 0.05 it takes 7 seeds" in out


def test_files(study: Path, compare: Compare) -> None:
    _, out, _ = compare()
    names = {"compare.md", "compare.csv", "compare.tex", "pareto.png", "pareto.pdf"}
    assert {path.name for path in (study / "out").iterdir()} == names
    assert all(str(study / "out" / name) in out for name in names)
    assert (study / "out" / "pareto.pdf").read_bytes().startswith(b"%PDF")
    text = (study / "out" / "compare.md").read_text()
    assert "| SNELL  |" in text
    assert "- Pareto front: no other row" in text


def test_pareto_front(study: Path, compare: Compare, write_run: WriteRun) -> None:
    write_run("full", 0, top1=None, status="oom", peak_mib=(1, 1, 1, 1, 1))
    compare()
    front = table_of(study)["front"].fillna("not judged").to_dict()
    # LoRA takes least memory, SNELL is best and beats GPS in both; what did not fit is not judged.
    assert front == {"LoRA": True, "SNELL": True, "GPS": False, "full fine-tuning": "not judged"}


def test_throughput_can_put_a_row_on_the_front(study: Path, compare: Compare, write_run: WriteRun) -> None:
    write_run("full", 0, top1=70.0, peak_mib=(9, 9, 9, 9, 9), throughput={"images_per_s": 5000.0})
    write_run("bias", 0, top1=70.0, peak_mib=(9, 9, 9, 9, 9), throughput={"images_per_s": 4000.0})
    compare()
    assert table_of(study)["front"].loc[["full fine-tuning", "BitFit"]].tolist() == [True, False]


def test_runs_that_did_not_fit_are_rows(study: Path, compare: Compare, write_run: WriteRun) -> None:
    write_run("lora", 3, top1=None, status="oom")
    _, out, _ = compare()
    rows = table_of(study).loc["LoRA"]
    assert list(zip(rows["status"], rows["n"], strict=True)) == [("ok", 3), ("oom", 1)]
    assert "oom" in out


def test_only_common_seeds_are_paired(study: Path, compare: Compare, write_run: WriteRun) -> None:
    write_run("snell", 7, top1=50.0)
    compare()
    snell = table_of(study).loc["SNELL"]
    assert (snell["n"], snell["num_pairs"], snell["difference"]) == (4, 3, 4)


def test_lower_is_better_for_some_metrics(write_run: WriteRun, tmp_path: Path, compare: Compare) -> None:
    for method, value in (("lora", 30.0), ("snell", 20.0)):
        metrics = {"test": {"fid": value}, "validation": {"fid": value}}
        write_run(method, 0, metrics=metrics, metric="fid", reported=("fid",))
    _, out, _ = compare()
    assert table_of(tmp_path)["front"].to_dict() == {"LoRA": False, "SNELL": True}
    assert "of FID less is better" in out


def test_baseline_by_method_and_by_row(study: Path, compare: Compare, write_run: WriteRun) -> None:
    compare("--baseline", "snell")
    assert table_of(study).loc["LoRA", "difference"] == -4
    write_run("snell", 0, label="r8", varied={"method.name": "snell", "method.r": 8})
    code, _, err = compare("--baseline", "snell")
    assert code == 2
    assert "several rows: name one of SNELL; SNELL, r=8" in err
    assert compare("--baseline", "SNELL, r=8")[0] == 0
    code, _, err = compare("--baseline", "gsp")
    assert code == 2
    assert "baseline is 'gsp', expected a method or one of these rows: LoRA, SNELL" in err


def test_two_runs_of_one_seed_are_refused(study: Path, compare: Compare, write_run: WriteRun) -> None:
    write_run("snell", 1, label="again")
    code, _, err = compare()
    assert code == 2
    assert "two runs of SNELL have seed 1" in err
    assert "again-seed1" in err


_OTHERS: dict[str, Any] = {
    "engine": "fsdp2",
    "precision": "bf16",
    "world_size": 2,
    "batch_size": 64,
    "protocol": "best-test",
    "model": "a larger one",
    "dataset": "others",
    "task": "segmentation",
    "predicted": True,
    "total_steps": 40,
    "skipped": ("a.png",),
    "metric_sources": {"fid": "other features"},
}


@pytest.mark.parametrize("field", FIELDS)
def test_unlike_runs_are_refused_by_name(study: Path, compare: Compare, write_run: WriteRun, field: str) -> None:
    other = {field: _OTHERS[field]} if field in _OTHERS else {"conditions": {field: 7}}
    write_run("shira", 0, **other)
    code, out, err = compare()
    assert (code, out) == (2, "")
    assert f"  - {field}: " in err
    assert err.count("  - ") == 1
    assert "study/shira-seed0" in err
    assert "(9 runs: study/" in err
    assert not (study / "out").exists()


def test_the_refusal_names_the_values(study: Path, compare: Compare, write_run: WriteRun) -> None:
    write_run("shira", 0, batch_size=64, conditions={"frozen_dtype": "bf16"})
    _, _, err = compare()
    assert "batch_size: 32 (9 runs: study/gps-seed0, study/gps-seed1, study/gps-seed2, …), 64 (1 run:" in err
    assert "frozen_dtype: not recorded (9 runs:" in err
    assert "bf16 (1 run: study/shira-seed0)" in err


def test_a_run_that_ended_before_it_knew_its_conditions_is_no_reason_to_refuse(
    write_run: WriteRun, tmp_path: Path, compare: Compare
) -> None:
    conditions = {"hardware": "a GPU", "frozen_dtype": "bf16"}
    for method in ("lora", "snell"):
        write_run(method, 0, conditions=conditions)
    write_run("snell", 1, status="oom", top1=None, conditions={"frozen_dtype": "bf16"})
    assert compare()[0] == 0
    assert list(table_of(tmp_path).index) == ["LoRA", "SNELL", "SNELL"]
    write_run("lora", 1, conditions={"frozen_dtype": "bf16"})
    code, _, err = compare()
    assert code == 2
    assert "hardware: a GPU (2 runs: study/lora-seed0, study/snell-seed0), not recorded (1 run:" in err


def test_forced_comparison_is_labelled_everywhere(study: Path, compare: Compare, write_run: WriteRun) -> None:
    write_run("shira", 0, batch_size=64)
    code, out, _ = compare("--force")
    assert code == 0
    label = "unlike runs: batch_size differ"
    assert label in out
    for name in ("compare.md", "compare.tex"):
        assert label.replace("_", r"\_" if name.endswith("tex") else "_") in (study / "out" / name).read_text()
    table = table_of(study)
    assert set(table["unlike"]) == {"batch_size"}
    assert table["batch_size"].to_dict() == {"LoRA": 32, "SHiRA": 64, "SNELL": 32, "GPS": 32}


def test_forced_comparison_keeps_unlike_runs_of_one_method_apart(
    study: Path, compare: Compare, write_run: WriteRun
) -> None:
    for seed in range(3):
        write_run("snell", seed, label="bf16", conditions={"frozen_dtype": "bf16"})
    compare("--force")
    rows = table_of(study)
    assert rows.loc["SNELL, frozen_dtype=not recorded", "n"] == rows.loc["SNELL, frozen_dtype=bf16", "n"] == 3


def test_predicted_rows_are_never_taken_for_measured_ones(
    study: Path, compare: Compare, write_run: WriteRun, tmp_path: Path
) -> None:
    write_run("full", 0, predicted=True, top1=None, throughput={})
    assert compare()[0] == 2
    code, out, _ = compare("--force")
    assert code == 0
    assert table_of(study).loc["full fine-tuning (predicted)", "predicted"]
    assert 'rows marked "(predicted)" are predicted' in out


def test_only_predicted_rows_are_said_to_be_so(write_run: WriteRun, tmp_path: Path, compare: Compare) -> None:
    for method in ("lora", "snell"):
        write_run(method, 0, predicted=True, top1=None, metric=None, throughput={})
    code, out, _ = compare()
    assert code == 0
    assert "all rows are predicted by `snell-scale estimate`: nothing of them ran" in out
    assert "LoRA (predicted)" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.md", "compare.csv", "compare.tex"}


def test_by_compares_within_each_value(study: Path, compare: Compare, write_run: WriteRun) -> None:
    for seed in range(3):
        for method, top1 in (("lora", 60.0), ("snell", 61.0)):
            write_run(method, seed, label=f"{method}-128", top1=top1 + seed, batch_size=128)
    assert compare()[0] == 2
    code, out, _ = compare("--by", "batch_size")
    assert code == 0
    table = table_of(study).reset_index()
    assert list(zip(table["batch_size"], table["label"], strict=True)) == [
        (32, "LoRA"),
        (32, "SNELL"),
        (32, "GPS"),
        (128, "LoRA"),
        (128, "SNELL"),
    ]
    assert table["difference"].tolist()[1:2] + table["difference"].tolist()[4:] == [4, 1]
    assert "difference from LoRA (batch_size 128)" in out
    assert set(table["unlike"].isna()) == {True}
    names = {path.name for path in (study / "out").glob("pareto*")}
    assert names == {f"pareto-{number}.{suffix}" for number in (1, 2) for suffix in ("png", "pdf")}


def test_by_takes_a_varied_key(write_run: WriteRun, tmp_path: Path, compare: Compare) -> None:
    for method in ("lora", "snell"):
        for rank in (4, 16, None):
            write_run(method, 0, label=f"{method}-{rank}", varied={"method.name": method, "method.r": rank})
    assert compare("--by", "method.r")[0] == 0
    table = table_of(tmp_path).reset_index()
    assert list(table["label"]) == ["LoRA", "SNELL"] * 3
    text = (tmp_path / "out" / "compare.md").read_text()
    cells = [line.split("|")[1].split() + line.split("|")[2].split() for line in text.splitlines()[2:8]]
    assert cells == [[method, rank] for rank in ("4", "16", "null") for method in ("LoRA", "SNELL")]
    code, _, err = compare("--by", "method.q")
    assert code == 2
    assert "--by method.q: the runs have no such field; what varies: method.name, method.r, seed" in err


def test_what_no_record_knows_is_said(study: Path, compare: Compare) -> None:
    _, out, _ = compare()
    assert "in no record, so not checked to be alike: microbatch_size, gradient_accumulation," in out


def test_random_weights_are_not_those_of_a_file(study: Path, compare: Compare, write_run: WriteRun) -> None:
    write_run("shira", 0, conditions={"weights": None})
    write_run("bias", 0, conditions={"weights": "trained.safetensors"})
    code, _, err = compare()
    assert code == 2
    assert "not recorded (9 runs: " in err
    assert "null (1 run: study/shira-seed0)" in err
    assert "weights: trained.safetensors (1 run: study/bias-seed0)" in err
