"""Ranks of known matrices, of runs on disk, within bounds, and their picture."""

import math
from pathlib import Path

import numpy as np
import pytest
from adapters import write_peft_adapter
from PIL import Image
from synthetic_runs import WriteRun

import analysis.updates.delta_ranks
from analysis.drawing import WIDTH_INCHES, write_png
from analysis.load import load_runs
from analysis.updates.delta_ranks import delta_ranks, rank_picture, rank_profile, rank_summary, ranks_of


def test_equal_singular_values_use_all_their_directions() -> None:
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0]
    for rank in (1, 5, 20):
        ranks = ranks_of(basis[:, :rank] @ basis[:rank])
        assert ranks == pytest.approx(dict.fromkeys(ranks, rank), rel=1e-4)


def test_the_measures_of_a_diagonal_by_hand() -> None:
    # σ = 4, 2, 2 with shares 1/2, 1/4, 1/4: entropy 1.5 bit. Σσ²/max = 24/16. The smallest is below the floor.
    ranks = ranks_of(np.diag([4.0, -2.0, 2.0, 1e-7]))
    assert ranks["effective_rank"] == pytest.approx(2**1.5, rel=1e-4)
    assert ranks["stable_rank"] == pytest.approx(1.5)
    assert ranks["numerical_rank"] == 3
    assert all(math.isnan(value) for value in ranks_of(np.zeros((3, 4))).values())


def test_a_little_noise_makes_the_numerical_rank_full_and_moves_the_others_little() -> None:
    rng = np.random.default_rng(0)
    low = rng.standard_normal((48, 4)) @ rng.standard_normal((4, 32))
    clean, noisy = ranks_of(low), ranks_of(low + 0.01 * rng.standard_normal(low.shape))
    assert (clean["numerical_rank"], noisy["numerical_rank"]) == (4, 32)
    assert noisy["stable_rank"] == pytest.approx(clean["stable_rank"], rel=1e-3)
    assert noisy["effective_rank"] < 1.1 * clean["effective_rank"]


@pytest.fixture
def study(write_run: WriteRun, tmp_path: Path) -> Path:
    """SNELL and LoRA with adapters of rank 4, two seeds; one method whose updates cannot be read."""
    for seed in (0, 1):
        for method in ("snell", "lora"):
            write_peft_adapter(write_run(method, seed), method)
    write_run("bias", 0)
    return tmp_path / "study"


def test_ranks_of_runs(study: Path) -> None:
    ranks = delta_ranks(load_runs([study]))
    table = ranks.table
    assert set(table["label"]) == {"SNELL", "LoRA"}
    assert set(table["folder"]) == {str(study / "snell-seed0"), str(study / "lora-seed0")}, "the first seeds"
    assert len(table) == 2 * 2 * 6
    lora, snell = (table.loc[table["label"] == label] for label in ("LoRA", "SNELL"))
    assert set(lora["numerical_rank"]) == {4}
    assert (snell["numerical_rank"] == snell[["num_rows", "num_columns"]].min(axis=1)).all()
    assert snell["nonzero_percent"].between(49, 51).all()
    assert "12 of 24 updates" in ranks.notes[0]
    assert ranks.notes[1].startswith("BitFit is left out:")
    summary = rank_summary(ranks)
    assert list(summary.loc[summary["label"] == "LoRA", "kind"]) == [
        "attn.proj", "attn.q", "attn.k", "attn.v", "mlp.fc1", "mlp.fc2",
    ]  # fmt: skip
    assert set(summary["n"]) == {2}


def test_the_profile_is_drawn_and_told(study: Path, tmp_path: Path) -> None:
    picture = rank_profile(load_runs([study]))
    assert picture is not None
    assert "LoRA" in picture.alt
    assert "Numerical rank misleads" in picture.alt
    with Image.open(write_png(picture, tmp_path)) as image:
        assert image.width == round(200 * WIDTH_INCHES)


def test_work_beyond_the_bound_samples_blocks_and_says_so(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis.updates.delta_ranks, "_MOST_WORK", 3 * 1.2 * 4 * 24**3 * 2)
    ranks = delta_ranks(load_runs([study]))
    assert set(ranks.table["block"]) == {"blocks.0"}
    assert "LoRA: of 2 blocks one in 2 was measured." in ranks.notes


def test_matrices_beyond_the_bound_are_left_out_and_said(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis.updates.delta_ranks, "_MOST_ENTRIES", 24 * 24)
    ranks = delta_ranks(load_runs([study]))
    assert set(ranks.table["kind"]) == {"attn.q", "attn.k", "attn.v", "attn.proj"}
    assert "SNELL: 4 matrices of more than 576 entries are left out." in ranks.notes


def test_without_adapters_there_is_no_picture(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("snell", 0)
    runs = load_runs([tmp_path])
    assert rank_profile(runs) is None
    ranks = delta_ranks(runs)
    assert rank_picture(ranks, runs) is None
    assert "holds no adapter" in ranks.notes[0]
