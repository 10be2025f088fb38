"""The sentences say what the numbers say, and no more."""

from pathlib import Path

import pytest
from synthetic_runs import WriteRun

from analysis.load import load_runs
from analysis.report_page.summary import protocol_sentence, sentences
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
        "No other mean ± std overlaps with it, but 3 seeds are too few for a sign-flip test."
    )
    # 16 MiB against 15 is 6.67 % more; both ran at 1001 images/s.
    assert second == (
        "SNELL beside LoRA: 5.0 points higher in top-1 % (95.0 ± 1.0 against 90.0 ± 1.0; mean ± std do not "
        "overlap, but 3 seeds are too few for a sign-flip test); 6.7 % more peak memory (16.0 against 15.0 MiB); "
        "equally fast (1,001 against 1,001 images/s)."
    )
    assert others == []


def test_six_seeds_can_settle_an_order(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(6):
        write_run("snell", seed, top1=94.0 + 0.1 * seed)
        write_run("lora", seed, top1=89.0 + 0.1 * seed)
    first, second = told(tmp_path)
    assert first.endswith("No other mean ± std overlaps with it.")
    assert "mean ± std do not overlap);" in second


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


def test_validation_chooses_the_variant_that_leads(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run("lora", seed, top1=92.0 + seed)
        for sparsity, test, validation in ((0.3, 95.0, 80.0), (0.9, 90.0, 85.0)):
            write_run(
                "snell",
                seed,
                label=f"s{sparsity}",
                varied={"method.name": "snell", "method.sparsity": sparsity},
                metrics={"test": {"top1": test + seed}, "validation": {"top1": validation}},
            )
    first = told(tmp_path)[0]
    assert first == (
        "With one variant of each method (chosen on validation), LoRA has the highest top-1 % on the test split: "
        "92.5 ± 0.7 (2 seeds: 0, 1). No other mean ± std overlaps with it, but 2 seeds are too few for a "
        "sign-flip test."
    )


def test_one_method_is_told_of_by_the_variant_that_validation_chose(write_run: WriteRun, tmp_path: Path) -> None:
    for r, test, validation in ((4, 95.0, 80.0), (8, 90.0, 85.0)):
        metrics = {"test": {"top1": test}, "validation": {"top1": validation}}
        write_run("lora", 0, label=f"r{r}", varied={"method.name": "lora", "method.r": r}, metrics=metrics)
    assert told(tmp_path)[0] == (
        "r=8 (chosen on validation, of 2 variants): top-1 % on the test split is 90.0 (seed 0)."
    )


def test_a_lucky_seed_does_not_lead(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("full", 0, top1=99.0)
    for seed in (0, 1):
        write_run("lora", seed, top1=90.0 + seed)
        write_run("snell", seed, top1=80.0 + seed)
    # Of LoRA's variants too.
    write_run("lora", 0, label="r8", top1=99.0, varied={"method.name": "lora", "method.r": 8})
    first = told(tmp_path)[0]
    assert first == (
        "With one variant of each method (chosen on validation), of those with 2 seeds, LoRA has the highest "
        "top-1 % on the test split: 90.5 ± 0.7 (2 seeds: 0, 1). Better, but of fewer seeds: full fine-tuning "
        "(99.0, seed 0)."
    )


def test_equal_means_are_level(write_run: WriteRun, tmp_path: Path) -> None:
    for method, scores in (("lora", (89.0, 91.0)), ("snell", (88.0, 92.0)), ("gps", (70.0, 71.0))):
        for seed, top1 in enumerate(scores):
            write_run(method, seed, top1=top1)
    assert told(tmp_path)[0] == (
        "LoRA is level with SNELL at the highest top-1 % on the test split: 90.0 ± 1.4 (2 seeds: 0, 1). "
        "No other mean ± std overlaps with it, but 2 seeds are too few for a sign-flip test."
    )


def test_copies_of_a_run_are_said(write_run: WriteRun, tmp_path: Path) -> None:
    copies = [write_run("lora", 0, label=label) for label in ("a", "b")]
    write_run("snell", 0)
    write_run("lora", 0, label="predicted", predicted=True, top1=None)
    text = " ".join(told(tmp_path))
    assert f"Several runs of LoRA have the same seed, and their mean stands for it: 0 ({copies[0]} and" in text
    assert text.count("Several runs") == 1


def test_what_one_record_lacks_differs(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, conditions={"hardware": "one"})
    write_run("full", 0, total_steps=40)
    text = " ".join(told(tmp_path))
    assert "Mind that hardware differs between the compared runs: not recorded, one." in text
    assert "Mind that total_steps differs between the compared runs: 20, 40." in text


def test_unlike_settings_and_runs_beside_are_said(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, batch_size=32)
    write_run("full", 0, batch_size=64)
    write_run("full", 0, label="pretrain", varied={})
    text = " ".join(told(tmp_path))
    assert "Mind that batch_size differs between the compared runs: 32, 64." in text
    assert "study/pretrain-seed0 was found beside the comparison" in text


def test_a_baseline_of_another_model_is_no_baseline(write_run: WriteRun, tmp_path: Path) -> None:
    for model, top1 in (("small", 80.0), ("large", 90.0)):
        varied = {"model.architecture": model}
        write_run("lora", 0, label=f"l-{model}", model=model, top1=top1, varied={"method.name": "lora", **varied})
    write_run(
        "snell", 0, model="small", top1=85.0, varied={"method.name": "snell", "model.architecture": "small"}
    )
    _, second, third, *_ = told(tmp_path)
    assert second.startswith("SNELL beside LoRA, architecture=small: 5.0 points higher")
    assert "several variants" not in third


def test_conditions_that_differ_are_said(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0, conditions={"allocator": "native", "hardware": "one"})
    write_run("full", 0, conditions={"allocator": "expandable_segments", "hardware": "one"})
    text = " ".join(told(tmp_path))
    assert "Mind that allocator differs between the compared runs: expandable_segments, native." in text
    assert "hardware" not in text


def test_predictions_are_counted_and_kept_apart(write_run: WriteRun, tmp_path: Path) -> None:
    for method in ("snell", "lora"):
        write_run(method, 0, top1=90.0)
        write_run(method, 1, top1=None, predicted=True, peak_mib=(90.0, 0.0, 0.0, 0.0, 0.0))
    write_run("full", 0, top1=None, predicted=True, status="oom")
    text = " ".join(told(tmp_path))
    assert "SNELL beside LoRA: no difference in top-1 %" in text
    assert "equal peak memory (15.0 against 15.0 MiB)" in text
    assert "3 of 5 runs are predicted by the estimator; nothing ran" in text
    assert "By the estimate these do not fit into the device's memory: full fine-tuning." in text
    assert "did not end well" not in text


def test_predictions_alone_are_compared_as_predictions(write_run: WriteRun, tmp_path: Path) -> None:
    for method, peak in (("snell", 30.0), ("lora", 20.0)):
        write_run(method, 0, top1=None, predicted=True, peak_mib=(peak, 0.0, 0.0, 0.0, 0.0))
    first, second = told(tmp_path)
    assert first == "All 2 runs are predicted by the estimator; nothing ran, and no score stands behind them."
    assert "50 % more predicted peak memory (30.0 against 20.0 MiB)" in second


def test_long_lists_are_cut(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(9):
        write_run("lora", seed, top1=None, status="failed")
        write_run("snell", seed)
    text = " ".join(told(tmp_path))
    assert "study/lora-seed4: failed and 4 more." in text
    assert "(9 seeds: 0, 1, 2, 3, 4, 4 more)" in text


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
