"""Savings are formed in equal settings only, and stand beside the published ones."""

from pathlib import Path

import pandas as pd
import pytest
from scaling_runs import VIT_B, VIT_H, with_ranks, write_job
from synthetic_runs import WriteRun

from analysis.load import load_runs
from analysis.scaling.cases import has_peak, memory_text, params_text, scaling_cases
from analysis.scaling.published import PUBLISHED_MEMORY, published_of
from analysis.scaling.savings import published_table, saving_sentences, savings


def savings_of(root: Path) -> pd.DataFrame:
    return savings(scaling_cases(load_runs([root])))


def test_the_published_savings_are_those_of_the_abstract() -> None:
    table = published_table()
    assert list(table["against_gps_percent"].round(1)) == [31.1, 39.9, 39.9]
    assert list(table["against_lora_percent"].round(1)) == [-8.2, -4.5, -3.9]


def test_a_saving_is_the_share_of_the_base_s_peak(write_run: WriteRun, tmp_path: Path) -> None:
    for method, peak in (("snell", 60.0), ("full", 200.0), ("gps", 100.0), ("lora", 50.0)):
        write_job(write_run, method, peak=peak)
    table = savings_of(tmp_path).set_index("base_method")
    assert table["saving_percent"].to_dict() == pytest.approx({"full": 70, "gps": 40, "lora": -20})
    assert table["published_percent"].round(1).to_dict() == {"full": pytest.approx(float("nan"), nan_ok=True)} | {
        "gps": 31.1, "lora": -8.2,
    }  # fmt: skip
    told = saving_sentences(table.reset_index())
    assert (
        "SNELL needs 40.0 % less memory than GPS at its peak (1 case in equal settings, 86.6M parameters)."
        in told
    )
    assert any(sentence.startswith("SNELL needs 20.0 % more memory than LoRA") for sentence in told)
    assert "31.1 to 39.9 % less memory than GPS, and 3.9 to 8.2 % more memory than LoRA" in told[-1]


@pytest.mark.parametrize(
    "other",
    [
        {"batch": 16},
        {"model": VIT_H},
        {"precision": "bf16"},
        {"engine": "ddp"},
        {"predicted": True},
        {"conditions": {"activation_checkpointing": True}},
        {"conditions": {"optimizer": "sgd"}},
        {"conditions": {"fused_attention": False}},
        {"memory": with_ranks([100.0]) | {"source": "cuda allocator"}},
    ],
    ids=str,
)
def test_unlike_runs_have_no_saving(other: dict, write_run: WriteRun, tmp_path: Path) -> None:
    write_job(write_run, "snell", peak=60)
    write_job(write_run, "gps", peak=100, **other)
    assert savings_of(tmp_path).empty


def test_lora_counts_at_the_same_rank_only_and_gps_at_any(write_run: WriteRun, tmp_path: Path) -> None:
    for rank in (8, 32):
        write_job(write_run, "snell", peak=60 + rank, r=rank)
        write_job(write_run, "lora", peak=50, r=rank)
    write_job(write_run, "gps", peak=100, r=8)
    table = savings_of(tmp_path)
    pairs = set(zip(table["label"], table["base_label"], strict=True))
    assert pairs == {
        ("SNELL, r=8", "LoRA, r=8"), ("SNELL, r=32", "LoRA, r=32"), ("SNELL, r=8", "GPS"), ("SNELL, r=32", "GPS"),
    }  # fmt: skip


def test_a_rank_that_is_not_varied_is_read_from_the_config(write_run: WriteRun, tmp_path: Path) -> None:
    for method, rank in (("snell", 32), ("lora", 8), ("klora", 8)):
        folder = write_job(write_run, method, peak=60, r=None)
        (folder / "config.yaml").write_text(f"method:\n  name: {method}\n  r: {rank}\n")
    table = savings_of(tmp_path)
    assert list(table["method"]) == ["klora"]


def test_the_fullest_rank_counts_and_the_seeds_are_averaged(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, peaks in ((0, [50.0, 70.0]), (1, [50.0, 90.0])):
        write_job(write_run, "snell", peak=50, ranks=2, engine="ddp", seed=seed, memory=with_ranks(peaks))
    cases = scaling_cases(load_runs([tmp_path]))
    assert (len(cases), cases["n"].iloc[0], cases["peak_mib"].iloc[0]) == (1, 2, pytest.approx(80))


def test_a_run_that_ran_out_has_no_peak_to_compare_and_a_prediction_has(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_job(write_run, "full", peak=90, status="oom")
    write_job(write_run, "full", peak=90, status="oom", predicted=True)
    write_job(write_run, "snell", peak=60)
    write_job(write_run, "snell", peak=60, predicted=True)
    cases = scaling_cases(load_runs([tmp_path]))
    assert len(cases) == 4
    assert len(has_peak(cases)) == 3
    table = savings(cases)
    assert list(table["predicted"]) == [True]
    assert saving_sentences(table)[0].startswith("SNELL is predicted to need 33.3 % less memory than full")


def test_published_rows_are_of_the_same_architecture_and_image_size() -> None:
    base, _, huge = PUBLISHED_MEMORY
    assert published_of(VIT_B, image_size=float("nan")) is base
    assert published_of(VIT_H, image_size="[224, 224]") is huge
    assert published_of(VIT_H, image_size="[518, 518]") is None
    assert published_of("vit_base_patch16_384", image_size=None) is None
    assert published_of("vit_small_patch16_224", image_size=None) is None


def test_sizes_in_words() -> None:
    assert [params_text(value) for value in (512, 86_600_000, 1.01e9, 1.8e10)] == ["512", "86.6M", "1.01B", "18B"]
    assert [memory_text(value) for value in (640, 12_595.2, float("nan"))] == ["640 MiB", "12.3 GiB", "–"]


def test_names_of_models_make_one_line_of_a_method_and_keep_what_was_published(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for case, model, peak in (("ViT-B/16", VIT_B, 100.0), ("ViT-H/14", VIT_H, 400.0)):
        for method, factor in (("snell", 1.0), ("gps", 1.5)):
            write_job(write_run, method, peak=factor * peak, model=model, case=case, batch=8)
    cases = scaling_cases(load_runs([tmp_path]))
    assert set(cases["label"]) == {"SNELL", "GPS"}
    assert set(cases["model"]) == {"ViT-B/16", "ViT-H/14"}
    assert set(cases["architecture"]) == {VIT_B, VIT_H}
    table = savings(cases)
    assert list(table["saving_percent"].round(1)) == [33.3, 33.3]
    assert table["published_percent"].notna().all()


def test_names_of_other_settings_stay_with_the_method(write_run: WriteRun, tmp_path: Path) -> None:
    for case in ("small", "large"):
        write_job(write_run, "snell", peak=100.0, case=case)
    write_job(write_run, "snell", peak=400.0, model=VIT_H, case="huge")
    cases = scaling_cases(load_runs([tmp_path]))
    assert set(cases["label"]) == {"SNELL, small", "SNELL, large", "SNELL, huge"}
    assert set(cases["model"]) == {VIT_B, VIT_H}
