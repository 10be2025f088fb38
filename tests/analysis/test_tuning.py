"""The best learning rate per method, from made-up runs with known scores."""

import pytest
from synthetic_runs import WriteRun

from analysis.load import load_runs
from analysis.tuning import best_learning_rates, main


def write(write_run: WriteRun, method: str, rate: float, seed: int, top1: float | None, **fields: str) -> str:
    varied = {"method.name": method, "training.lr": rate}
    folder = write_run(method, seed, top1=top1, varied=varied, label=f"{method}-{rate}", **fields)
    return str(folder.parent)


def test_best_rate_is_by_mean_validation_score_of_rates_that_always_ended_well(write_run: WriteRun) -> None:
    for seed in (0, 1):
        write(write_run, "lora", 0.001, seed, 80.0)
        write(write_run, "lora", 0.01, seed, 90.0 - seed)
        write(write_run, "full", 0.001, seed, 70.0)
    root = write(write_run, "full", 0.01, 0, 95.0)
    write(write_run, "full", 0.01, 1, None, status="diverged")
    write(write_run, "snell", 0.001, 0, None, status="oom")
    table = best_learning_rates(load_runs([root])).set_index("method")
    assert table.loc["lora", "0.01"] == "90.50"  # validation is one above test: (91 + 90) / 2
    assert table["best"].to_dict() == {"lora": "0.01", "full": "0.001", "snell": "–"}


def test_equal_scores_name_the_smaller_rate(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(write_run, "lora", 0.01, 0, 80.0)
    write(write_run, "lora", 0.001, 0, 80.0)
    assert best_learning_rates(load_runs([root]))["best"].tolist() == ["0.001"]
    main([root])
    assert "0.001" in capsys.readouterr().out


def test_runs_without_a_rate_are_refused(write_run: WriteRun) -> None:
    root = write_run("lora", 0).parent
    with pytest.raises(ValueError, match=r"training\.lr"):
        best_learning_rates(load_runs([root]))
