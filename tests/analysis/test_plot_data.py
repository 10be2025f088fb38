"""What the page's script is given: the runs in the order of their table, and nothing that JSON cannot hold."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from synthetic_runs import WriteRun

from analysis.drawing import styles_of
from analysis.load import load_curves, load_runs
from analysis.report_page.plot_data import colors_of, facets_of, plot_data, plot_kinds
from analysis.tables import comparison


def data_of(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    runs = load_runs([folder])
    return runs, plot_data(runs, load_curves(runs), styles_of(comparison(runs)))


def test_every_run_has_its_place_and_its_values(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("snell", 0, top1=91.23456789)
    write_run("full", 0, top1=None, status="oom", curve=())
    write_run("lora", 0, label="pretrain", varied={})
    runs, data = data_of(tmp_path)
    assert [run["name"] for run in data["runs"]] == list(runs["name"])
    full, pretrain, snell = data["runs"]
    at = data["fields"].index("Top-1 % on test")
    assert (snell["values"][at], full["values"][at]) == (91.2346, None)
    assert snell["curve"] == [(10, 50.0), (20, 80.0)]
    assert snell["memory"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [category["name"] for category in data["categories"]] == [
        "parameters", "gradients", "optimizer", "activations", "temporary",
    ]  # fmt: skip
    # What stands beside the comparison is in the table, and in no plot.
    assert pretrain["series"] is None
    assert "values" not in pretrain
    assert [series["name"] for series in data["series"]] == ["SNELL", "full fine-tuning"]
    assert data["series"][1]["color"] == "currentColor"
    assert colors_of(data) == {"SNELL": "#D55E00", "full fine-tuning": "currentColor"}
    assert [data["fields"][index] for index in data["axes"]] == [
        "Peak memory of a training step (MiB)", "Top-1 % on test",
    ]  # fmt: skip
    assert [data["fields"][index] for index in data["scores"]] == [
        "Top-1 % on test", "Top-1 % on validation",
    ]  # fmt: skip
    json.dumps(data, allow_nan=False)


def test_of_many_labels_the_methods_are_the_series(write_run: WriteRun, tmp_path: Path) -> None:
    for method in ("lora", "snell"):
        for r in range(1, 9):
            write_run(method, 0, label=f"{method}-{r}", varied={"method.name": method, "method.r": r})
    _, data = data_of(tmp_path)
    assert [series["name"] for series in data["series"]] == ["LoRA", "SNELL"]
    assert {run["label"] for run in data["runs"]} >= {"LoRA, r=1", "SNELL, r=8"}
    assert "method.r" in data["fields"]


def test_choices_have_several_values_and_no_name_twice(write_run: WriteRun, tmp_path: Path) -> None:
    for engine, ranks in (("single", 1), ("fsdp2", 2)):
        varied = {"method.name": "lora", "engine.name": engine, "world_size": ranks, "method.r": ranks}
        write_run("lora", 0, label=engine, engine=engine, world_size=ranks, varied=varied)
    write_run("lora", 0, label="estimate", predicted=True, varied={"method.name": "lora", "method.r": 2})
    found = facets_of(load_runs([tmp_path]))
    assert {key: heading for key, (heading, _) in found.items()} == {
        "engine": "Engine", "predicted": "Source", "world_size": "Ranks", "varied.method.r": "method.r",
    }  # fmt: skip
    assert sorted(found["predicted"][1]) == ["measured", "measured", "predicted"]


def test_estimates_alone_are_drawn_against_their_size(write_run: WriteRun, tmp_path: Path) -> None:
    for size in (10**8, 10**9):
        write_run("lora", 0, label=f"{size}", predicted=True, top1=None, num_total_params=size, curve=())
    _, data = data_of(tmp_path)
    assert [data["fields"][index] for index in data["axes"]] == [
        "Parameters",
        "Peak memory of a training step (MiB)",
    ]
    assert plot_kinds(data) == ["scatter", "bars"]


def test_estimates_of_one_size_are_drawn_against_their_ranks(write_run: WriteRun, tmp_path: Path) -> None:
    for ranks in (1, 8):
        write_run("lora", 0, label=f"{ranks}", predicted=True, top1=None, world_size=ranks, curve=())
    _, data = data_of(tmp_path)
    assert [data["fields"][index] for index in data["axes"]] == ["Ranks", "Peak memory of a training step (MiB)"]


def test_long_curves_are_thinned_and_keep_their_end(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, curve=tuple(float(value) for value in range(1000)))
    _, data = data_of(tmp_path)
    (run,) = data["runs"]
    assert len(run["curve"]) == 200
    assert run["curve"][-1] == (10_000, 999.0)


def test_a_run_without_anything_has_no_plot(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, top1=None, status="failed", memory=None, throughput={}, seconds={}, curve=())
    _, data = data_of(tmp_path)
    assert plot_kinds(data) == []
