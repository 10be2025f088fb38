"""The transfer tables, from made-up runs whose means are known by hand."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import WriteRun

from analysis.benchmarks import BENCHMARKS, FGVC, VTAB
from analysis.load import load_runs
from analysis.transfer import main, transfer_table


def write(
    write_run: WriteRun, task: str, seed: int, top1: float | None, *, method: str = "snell", **more: Any
) -> Path:
    """One run on "vtab/cifar" or "fgvc/cub"; its folder's parent holds all."""
    varied = {"config": task.split("/")[1], "method.name": method, **more.pop("varied", {})}
    label = f"{task.replace('/', '-')}-{method}-{more.pop('label', '')}"
    folder = write_run(method, seed, top1=top1, dataset=task, varied=varied, label=label, **more)
    return folder.parent


def row_of(
    root: Path, benchmark: Any, label: str = "SNELL", source: str = "here (validation chooses)"
) -> dict[str, Any]:
    table = transfer_table(load_runs([root]), benchmark)
    rows = table.loc[(table["label"] == label) & (table["source"] == source)]
    assert len(rows) == 1, table[["label", "source"]]
    return rows.iloc[0].to_dict()


def all_of_vtab(write_run: WriteRun) -> Path:
    """Seeds 0 and 1: natural tasks 80 and 82, specialized 70 and 70, structured 50 and 56."""
    root = Path()
    scores = {"Natural": (80.0, 82.0), "Specialized": (70.0, 70.0), "Structured": (50.0, 56.0)}
    for group, tasks in VTAB.groups.items():
        for task in tasks:
            for seed in (0, 1):
                root = write(write_run, f"vtab/{task}", seed, scores[group][seed])
    return root


def test_mean_of_groups_and_mean_of_tasks_are_told_apart(write_run: WriteRun) -> None:
    row = row_of(all_of_vtab(write_run), VTAB)
    assert row["cifar_mean"] == 81.0
    assert row["cifar_std"] == pytest.approx(math.sqrt(2))
    assert (row["Natural_mean"], row["Specialized_mean"], row["Structured_mean"]) == pytest.approx((81, 70, 53))
    assert row["groups_mean"] == pytest.approx((81 + 70 + 53) / 3)
    assert row["all_mean"] == pytest.approx((7 * 81 + 4 * 70 + 8 * 53) / 19)
    # Seed 0 has (80 + 70 + 50) / 3, seed 1 (82 + 70 + 56) / 3: 8 / 3 apart.
    assert row["groups_std"] == pytest.approx(8 / 3 / math.sqrt(2))
    assert row["all_std"] == pytest.approx((7 * 2 + 8 * 6) / 19 / math.sqrt(2))
    assert (row["n"], row["tasks"]) == ("2", "19/19")


def test_no_mean_is_formed_of_an_incomplete_set(write_run: WriteRun) -> None:
    root = all_of_vtab(write_run)
    (root / "vtab-dmlab-snell--seed0/result.json").unlink()
    (root / "vtab-dmlab-snell--seed1/result.json").unlink()
    write(write_run, "vtab/kitti", 2, None, status="diverged")
    row = row_of(root, VTAB)
    assert (row["dmlab_state"], row["kitti_state"]) == ("–", "2 ok, 1 diverged")
    assert all(math.isnan(row[f"{name}_mean"]) for name in ("dmlab", "kitti", "Structured", "groups", "all"))
    assert row["Natural_mean"] == pytest.approx(81)
    assert row["tasks"] == "17/19"


def test_rows_are_methods_and_what_differs_on_one_task(write_run: WriteRun) -> None:
    for task in FGVC.tasks:
        for rank in (8, 32):
            root = write(
                write_run,
                f"fgvc/{task}",
                0,
                90.0 + rank,
                varied={"method.r": rank},
                label=f"r{rank}",
                batch_size=rank,
            )
        write(write_run, f"fgvc/{task}", 0, 80.0, method="lora")
        write(write_run, f"fgvc/{task}", 0, 99.0, label="best", protocol="best-test", varied={"method.r": 32})
    write(write_run, "fgvc/cub", 1, 82.0, method="lora")
    assert row_of(root, FGVC, "SNELL, r=8")["groups_mean"] == 98.0
    assert row_of(root, FGVC, "SNELL, r=32")["groups_mean"] == 122.0
    assert row_of(root, FGVC, "SNELL, r=32", "here (best test epoch)")["groups_mean"] == 99.0
    lora = row_of(root, FGVC, "LoRA")
    assert lora["n"] == "1–2"
    assert lora["groups_mean"] == pytest.approx((81 + 4 * 80) / 5)
    assert math.isnan(lora["groups_std"])  # only one seed has every set
    labels = transfer_table(load_runs([root]), FGVC)["label"].tolist()
    assert labels[:4] == ["LoRA", "SNELL, r=32", "SNELL, r=32", "SNELL, r=8"]


def test_published_rows_stand_beside_and_are_labelled(write_run: WriteRun) -> None:
    root = all_of_vtab(write_run)
    published = row_of(root, VTAB, "SNELL-32", "published (best test epoch)")
    assert published["groups_mean"] == 76.9
    assert math.isnan(published["all_mean"])
    table = transfer_table(load_runs([write(write_run, "fgvc/cub", 0, 1.0)]), FGVC)
    assert table.loc[table["label"] == "SNELLA", "groups_mean"].tolist() == [91.9]


def test_tables_are_written_for_each_benchmark_there_is(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = all_of_vtab(write_run)
    assert main([str(root), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["vtab.csv", "vtab.md", "vtab.tex"]
    text = (tmp_path / "out/vtab.md").read_text()
    own = next(line for line in text.splitlines() if line.startswith("| SNELL ") and "here" in line)
    assert "| 81.0 ± 1.4 |" in own
    assert "68.0 ± 1.9 |" in own
    assert "published (best test epoch)" in text
    assert "Specialized: Camelyon, EuroSAT, Resisc45, Retinopathy" in text
    with (tmp_path / "out/vtab.csv").open() as file:
        first = next(csv.DictReader(file))
    assert float(first["groups_mean"]) == 68.0
    assert "Mean of 3 groups" in capsys.readouterr().out
    write(write_run, "fgvc/cub", 0, 88.0)
    assert main([str(root), "--output", str(tmp_path / "both")]) == 0
    assert len(list((tmp_path / "both").iterdir())) == 6


def test_what_cannot_be_told_apart_or_used_is_named(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_run("snell", 0).parent
    assert main([str(root), "--output", str(tmp_path / "out")]) == 2
    assert "no run has a data set named vtab/… or fgvc/…" in capsys.readouterr().err
    write(write_run, "vtab/cifar", 0, 80.0, label="one")
    write(write_run, "vtab/cifar", 0, 81.0, label="other")
    assert main([str(root), "--output", str(tmp_path / "out")]) == 2
    assert "two runs of SNELL on cifar have seed 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_tasks_are_those_of_the_loaders() -> None:
    from snell_scale.data.labelled.fgvc import FgvcConfig
    from snell_scale.data.labelled.vtab import TASKS, VtabConfig

    tasks = {
        "vtab": [VtabConfig(root="x", task=task).describe() for task in TASKS],
        "fgvc": [FgvcConfig.model_validate({"root": "x", "set": name}).describe() for name in FGVC.tasks],
    }
    for benchmark in BENCHMARKS:
        assert [f"{benchmark.name}/{task}" for task in benchmark.tasks] == tasks[benchmark.name]
    assert [len(group) for group in VTAB.groups.values()] == [7, 4, 8]
