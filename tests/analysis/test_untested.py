"""A comparison says why a row has no test: no baseline, no seed in common, one alone, or no spread."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from synthetic_runs import WriteRun

from analysis.compare import main

Notes = Callable[..., list[str]]


@pytest.fixture
def notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Notes:
    """Those of `python -m analysis.compare` that begin with "no "."""

    def call(*arguments: str) -> list[str]:
        assert main([str(tmp_path / "study"), "--output", str(tmp_path / "out"), *arguments]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("- no ")]

    return call


def write_all(write_run: WriteRun, method: str, scores: Sequence[float], *, first_seed: int = 0) -> None:
    for seed, top1 in enumerate(scores, start=first_seed):
        write_run(method, seed, top1=top1)


def test_several_rows_of_the_usual_baseline(write_run: WriteRun, notes: Notes) -> None:
    for seed in range(3):
        write_run("snell", seed, top1=95.0 - seed**2)
        for r in (4, 8):
            varied = {"method.name": "lora", "method.r": r}
            write_run("lora", seed, label=f"r{r}", top1=90.0 + seed, varied=varied)
    expected = "- no differences: LoRA has several rows; name one with --baseline: LoRA, r=4; LoRA, r=8"
    assert notes() == [expected]
    # Its other row differs from it by nothing in every seed.
    (left,) = notes("--baseline", "LoRA, r=8")
    assert left.endswith("the difference is the same for every seed: LoRA, r=4")


def test_no_row_of_the_usual_baseline(write_run: WriteRun, notes: Notes) -> None:
    write_all(write_run, "snell", (90.0, 91.0))
    assert notes() == []
    write_all(write_run, "gps", (90.0, 92.0))
    assert notes() == ["- no differences: no row is the baseline; name one with --baseline: SNELL; GPS"]


def test_no_common_seed_one_and_no_spread(write_run: WriteRun, notes: Notes) -> None:
    write_all(write_run, "lora", (90.0, 91.0, 93.0))
    write_all(write_run, "full", (95.0, 94.0, 99.0))
    assert notes() == []
    write_all(write_run, "snell", (90.0, 91.0), first_seed=3)
    write_all(write_run, "gps", (90.0, 91.0), first_seed=2)
    write_all(write_run, "bias", (91.0, 92.0, 94.0))
    write_run("shira", 0, top1=None, status="oom")
    assert notes() == [
        "- no difference from LoRA, as no seed ended ok in both: SNELL",
        "- no test against LoRA, as one seed alone ended ok in both: GPS",
        "- no t test against LoRA, as the difference is the same for every seed: BitFit",
    ]
