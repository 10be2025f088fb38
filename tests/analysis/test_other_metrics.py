"""Reports of tasks whose tables show several metrics, of which smaller may be better, and pictures of samples."""

import base64
from pathlib import Path

import pytest
from synthetic_runs import WriteRun, write_synthetic_run

from analysis.groups import choice_of, metric_of, others_of
from analysis.load import load_runs
from analysis.report import write_report
from analysis.report_page.summary import sentences, source_sentences
from analysis.tables import columns, comparison, display
from analysis.tuning import best_learning_rates

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def write_generation(root: Path, method: str, seed: int, *, kid: float, loss: float, **fields: object) -> Path:
    """A made-up run that validation loss chose, reporting KID and loss."""
    metrics = {"test": {"kid": kid, "loss": loss, "fid": 9.0}, "validation": {"loss": loss}}
    settings = {"metric": "loss", "reported": ("kid", "loss"), "metric_sources": {"kid": "a digit classifier"}}
    return write_synthetic_run(root, method, seed, **{"metrics": metrics, **settings, **fields})


@pytest.fixture
def runs_folder(tmp_path: Path) -> Path:
    for seed in (0, 1):
        write_generation(tmp_path, "lora", seed, kid=30.0 + seed, loss=0.05)
        folder = write_generation(tmp_path, "snell", seed, kid=10.0 + seed, loss=0.04)
        (folder / "pictures").mkdir()
        (folder / "pictures" / "samples.png").write_bytes(PNG)
        (folder / "pictures" / "step-000010-samples.png").write_bytes(PNG)
    return tmp_path / "study"


def test_tables_show_every_reported_metric_and_the_first_is_the_score(runs_folder: Path) -> None:
    runs = load_runs([runs_folder])
    assert (metric_of(runs), choice_of(runs), others_of(runs)) == ("kid", "loss", ["loss"])
    table = comparison(runs)
    texts = display(table, columns(table, "kid")).set_index("Method")
    assert texts.loc["SNELL", "KID ×1000"] == "10.5 ± 0.7"
    assert texts.loc["SNELL", "Loss"] == "0.040 ± 0.000"
    assert "FID" not in texts  # measured, not reported


def test_the_lowest_is_the_best_where_smaller_is_better(runs_folder: Path) -> None:
    runs = load_runs([runs_folder])
    told = sentences(comparison(runs), runs)
    assert told[0].startswith("SNELL has the lowest KID ×1000 on the test split: 10.5 ± 0.7")
    assert source_sentences(runs) == ["KID ×1000: a digit classifier."]


def test_the_smallest_loss_names_the_best_learning_rate(write_run: WriteRun) -> None:
    for rate, loss in ((0.001, 0.5), (0.01, 0.4), (0.1, 0.6)):
        varied = {"method.name": "lora", "training.lr": rate}
        metrics = {"validation": {"loss": loss}, "test": {"loss": loss}}
        root = write_run("lora", 0, varied=varied, label=f"{rate}", metric="loss", metrics=metrics).parent
    assert best_learning_rates(load_runs([root]))["best"].tolist() == ["0.01"]


def test_the_report_holds_the_pictures_of_the_first_seed(runs_folder: Path, tmp_path: Path) -> None:
    page = write_report([runs_folder], tmp_path / "out", title="Samples").read_text(encoding="utf-8")
    assert page.count(base64.b64encode(PNG).decode()) == 1
    assert "<strong>SNELL: samples.</strong> Test split, seed 0." in page
    assert "Down and to the left is better" in page


def test_a_run_beside_the_comparison_may_have_another_metric(runs_folder: Path, tmp_path: Path) -> None:
    write_synthetic_run(runs_folder.parent, "full", 0, label="judge", varied={}, top1=97.3)
    runs = load_runs([runs_folder])
    assert (metric_of(runs), choice_of(runs)) == ("kid", "loss")
    page = write_report([runs_folder], tmp_path / "out", title="Judged").read_text(encoding="utf-8")
    assert "study/judge-seed0" in page
    assert "97.3" not in page  # top-1 is no KID


def test_a_report_without_pictures_has_no_section_for_them(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("lora", 0).parent
    page = write_report([folder], tmp_path / "out", title="None").read_text(encoding="utf-8")
    assert 'id="samples"' not in page
