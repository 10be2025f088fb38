"""Labels: what is one group, and what a person reads."""

from pathlib import Path

import pytest
from synthetic_runs import WriteRun

from analysis.groups import metric_of, with_labels
from analysis.load import load_runs


def test_methods_are_labelled_by_name_in_a_fixed_order(write_run: WriteRun, tmp_path: Path) -> None:
    for method in ("full", "snell", "lora", "novel"):
        write_run(method, 1)
        write_run(method, 0)
    labelled = with_labels(load_runs([tmp_path]))
    assert list(labelled["label"].unique()) == ["LoRA", "SNELL", "full fine-tuning", "novel"]
    assert list(labelled["seed"]) == [0, 1] * 4


def test_only_what_differs_within_a_method_is_in_its_label(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, varied={"method.name": "lora", "training.lr": 0.001})
    for sparsity in (0.9, 0.3):
        write_run(
            "snell",
            0,
            label=f"s{sparsity}",
            varied={"method.name": "snell", "method.sparsity": sparsity, "training.lr": 0.01},
        )
    labels = with_labels(load_runs([tmp_path]))["label"]
    assert list(labels) == ["LoRA", "SNELL, sparsity=0.3", "SNELL, sparsity=0.9"]


def test_numbers_sort_as_numbers_and_words_after_them(write_run: WriteRun, tmp_path: Path) -> None:
    for scale in ("auto", 10, 2, True):
        write_run("snell", 0, label=f"s{scale}", varied={"method.scale": scale})
    labels = with_labels(load_runs([tmp_path]))["label"]
    assert list(labels) == ["scale=2", "scale=10", "scale=true", "scale=auto"]


def test_cases_are_named_by_themselves(write_run: WriteRun, tmp_path: Path) -> None:
    for case in ("zeros", "random"):
        write_run("snell", 0, label=case, varied={"case": case})
    assert list(with_labels(load_runs([tmp_path]))["label"]) == ["random", "zeros"]


def test_a_setting_that_no_varied_key_explains_splits_the_group(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, label="a", varied={}, batch_size=32)
    write_run("lora", 0, label="b", varied={}, batch_size=64)
    assert list(with_labels(load_runs([tmp_path]))["label"]) == ["batch_size=32", "batch_size=64"]


def test_a_setting_that_follows_from_a_varied_key_is_named_once(write_run: WriteRun, tmp_path: Path) -> None:
    for size in (32, 64):
        write_run("lora", 0, label=f"b{size}", varied={"training.batch_size": size}, batch_size=size)
    runs = load_runs([tmp_path])
    assert list(with_labels(runs)["label"]) == ["batch_size=32", "batch_size=64"]
    assert list(with_labels(runs, leave_out=["varied.training.batch_size"])["label"]) == ["LoRA", "LoRA"]


def test_keys_that_end_alike_are_written_whole(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, label="a", varied={"model.width": 32, "method.width": 1})
    write_run("lora", 0, label="b", varied={"model.width": 64, "method.width": 2})
    label = with_labels(load_runs([tmp_path]))["label"].iloc[0]
    assert "model.width=32" in label
    assert "method.width=1" in label


def test_runs_of_different_metrics_are_refused(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0)
    write_run("lora", 1, metric="miou")
    with pytest.raises(ValueError, match="miou, top1"):
        metric_of(load_runs([tmp_path]))
