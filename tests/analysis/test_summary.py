"""The sentences say what the numbers say, and no more."""

from pathlib import Path

import pytest
from synthetic_runs import WriteRun

from analysis.load import load_runs
from analysis.summary import protocol_sentence, sentences
from analysis.tables import comparison


def told(folder: Path) -> list[str]:
    runs = load_runs([folder])
    return sentences(comparison(runs), runs)


def test_clear_winner(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, (snell, lora) in enumerate([(94.0, 89.0), (95.0, 90.0), (96.0, 91.0)]):
        write_run("snell", seed, top1=snell, peak_mib=(1.0, 2.0, 3.0, 4.0, 6.0))
        write_run("lora", seed, top1=lora)
    first, second, *others = told(tmp_path)
    assert first == (
        "SNELL has the highest top-1 % on the test split: 95.0 ± 1.0 (3 seeds: 0, 1, 2). "
        "No other mean ± std overlaps with it."
    )
    # 16 MiB against 15 is 6.67 % more; both ran at 1001 images/s.
    assert second == (
        "SNELL beside LoRA: 5.0 points higher in top-1 % (95.0 ± 1.0 against 90.0 ± 1.0; mean ± std do not "
        "overlap); 6.7 % more peak memory (16.0 against 15.0 MiB); equally fast (1,001 against 1,001 images/s)."
    )
    assert others == []


def test_overlap_and_a_loss_are_said(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, (snell, full) in enumerate([(88.0, 89.0), (90.0, 91.0), (92.0, 93.0)]):
        write_run("snell", seed, top1=snell)
        write_run("full", seed, top1=full)
    first, second = told(tmp_path)
    assert first.endswith(
        "SNELL (90.0 ± 2.0) overlaps with it (mean ± std): these runs do not settle the order among them."
    )
    assert "1.0 points lower" in second
    assert "overlap, so the difference is not settled" in second


def test_one_seed_claims_no_order(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("snell", 0, top1=95.0)
    write_run("lora", 0, top1=60.0)
    first, second = told(tmp_path)
    assert first.endswith("(seed 0). One seed shows no spread: the order is not settled.")
    assert "mean ± std unknown: one seed" in second


def test_failures_and_missing_seeds_are_said(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run("lora", seed, top1=90.0 + seed)
    write_run("full", 0, top1=92.0)
    write_run("full", 1, top1=None, status="oom")
    text = " ".join(told(tmp_path))
    assert "1 of 4 runs did not end well and is in no mean above: study/full-seed1: oom." in text
    assert "Fewer than 2 seeds stand behind full fine-tuning (1)." in text


def test_nothing_succeeded(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("snell", 0, top1=None, status="diverged")
    write_run("lora", 0, top1=None, status="failed")
    first, second = told(tmp_path)
    assert first == "No run has a top-1 % on the test split to report."
    assert second.startswith("2 of 2 runs did not end well and are in no mean above")


def test_validation_not_test_chooses_the_variant_that_is_spoken_of(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, top1=90.0)
    for sparsity, test, validation in ((0.3, 95.0, 80.0), (0.9, 91.0, 85.0)):
        write_run(
            "snell",
            0,
            label=f"s{sparsity}",
            varied={"method.name": "snell", "method.sparsity": sparsity},
            metrics={"test": {"top1": test}, "validation": {"top1": validation}},
        )
    _, second, third = told(tmp_path)
    assert second.startswith("SNELL, sparsity=0.9 beside LoRA: 1.0 points higher")
    assert "SNELL, sparsity=0.9 (the best on validation of 2)" in third


def test_unlike_settings_and_runs_beside_are_said(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, batch_size=32)
    write_run("full", 0, batch_size=64)
    write_run("full", 0, label="pretrain", varied={})
    text = " ".join(told(tmp_path))
    assert "Mind that batch_size differs between the compared runs: 32, 64." in text
    assert "study/pretrain-seed0 was found beside the comparison" in text


@pytest.mark.parametrize(
    ("protocols", "expected"),
    [
        (("validation", "validation"), "the validation split chose"),
        (("best-test", "best-test"), "optimistic: compare it with published tables only"),
        (("validation", "best-test"), "do not compare the two"),
    ],
)
def test_protocol(write_run: WriteRun, tmp_path: Path, protocols: tuple[str, str], expected: str) -> None:
    for seed, protocol in enumerate(protocols):
        write_run("lora", seed, protocol=protocol)
    assert expected in protocol_sentence(load_runs([tmp_path]))
