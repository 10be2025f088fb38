"""Which panels the figures of scaling have room for, and what they say of the others."""

from pathlib import Path

import pandas as pd
import pytest
from scaling_runs import VIT_H, write_job
from synthetic_runs import WriteRun

from analysis.load import load_runs
from analysis.scaling.cases import scaling_cases
from analysis.scaling.figures import memory_against_parameters
from analysis.scaling.rank_figures import memory_against_ranks
from analysis.scaling.ranks import rank_scaling


@pytest.fixture
def cases(write_run: WriteRun, tmp_path: Path) -> pd.DataFrame:
    """Predictions of seven series on four numbers of ranks each, and a measured one on two."""
    for per_rank in range(1, 8):
        for ranks in (2, 4, 8, 16):
            write_job(
                write_run, "snell", peak=100 * per_rank, engine="fsdp2", ranks=ranks, batch=per_rank * ranks,
                predicted=True, name=f"b{per_rank}",
            )  # fmt: skip
    for ranks in (1, 3):
        write_job(write_run, "snell", peak=100, engine="ddp", ranks=ranks, batch=11 * ranks)
    return scaling_cases(load_runs([tmp_path]))


def test_measured_series_are_drawn_before_predicted_ones_and_the_rest_is_named(cases: pd.DataFrame) -> None:
    picture = memory_against_ranks(rank_scaling(cases))
    assert picture is not None
    figure = picture.draw()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == 6
    assert any("ddp, weak (11 per rank)" in title.replace("\n", " ") for title in titles)
    assert "In the table only: vit_base_patch16_224.augreg…, fsdp2, " in picture.alt
    assert "In the table only: " in figure.get_suptitle()


def test_fused_and_unfused_attention_are_cases_and_panels_of_their_own(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for is_fused, peak in ((True, 100), (False, 140)):
        fields = {"conditions": {"fused_attention": is_fused}, "predicted": True, "name": str(is_fused)}
        write_job(write_run, "snell", peak=peak, **fields)
        write_job(write_run, "snell", peak=9 * peak, model=VIT_H, params=632_000_000, **fields)
    cases = scaling_cases(load_runs([tmp_path]))
    assert sorted(cases["peak_mib"]) == [100, 140, 900, 1260]
    assert cases["job"].nunique() == 4
    picture = memory_against_parameters(cases)
    assert picture is not None
    titles = " ".join(axes.get_title().replace("\n", " ") for axes in picture.draw().axes)
    assert "fused attention True" in titles
    assert "fused attention False" in titles


def test_models_of_one_size_are_not_drawn_against_their_size(write_run: WriteRun, tmp_path: Path) -> None:
    write_job(write_run, "snell", peak=100, params=86_600_000)
    write_job(write_run, "full", peak=200, params=86_300_000)
    assert memory_against_parameters(scaling_cases(load_runs([tmp_path]))) is None
    write_job(write_run, "snell", peak=900, model=VIT_H, params=632_000_000)
    assert memory_against_parameters(scaling_cases(load_runs([tmp_path]))) is not None
