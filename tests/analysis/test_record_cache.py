"""Many records are read once: what changed is read again, a useless cache is as good as none; what it takes."""

import json
import time
from pathlib import Path

import pandas as pd
import pytest
from many_runs import write_many_runs
from pandas.testing import assert_frame_equal

from analysis import load, record_cache
from analysis.load import load_runs
from analysis.record_cache import MIN_RECORDS, cache_file
from snell_scale.records import Result, read_result

_NUM_RUNS = 500


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_many_runs(tmp_path / "runs", _NUM_RUNS)
    return tmp_path / "runs"


@pytest.fixture
def records_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the run folders whose record was read, since the test last cleared it."""
    names: list[str] = []

    def reading(folder: Path) -> Result:
        names.append(f"{folder.parent.name}/{folder.name}")
        return read_result(folder)

    monkeypatch.setattr(load, "read_result", reading)
    return names


def test_what_is_known_is_not_read_again_and_gives_the_same_table(runs: Path, records_read: list[str]) -> None:
    cold = load_runs([runs])
    assert len(records_read) == len(cold) == _NUM_RUNS
    records_read.clear()
    assert_frame_equal(load_runs([runs]), cold)
    assert records_read == []


def test_only_what_changed_is_read_again(runs: Path, records_read: list[str]) -> None:
    load_runs([runs])
    records_read.clear()
    changed = runs / "study-001" / "run-07" / "result.json"
    record = json.loads(changed.read_text()) | {"seed": 77_777}
    changed.write_text(json.dumps(record))
    (runs / "study-000" / "run-00" / "result.json").unlink()
    frame = load_runs([runs])
    assert records_read == ["study-001/run-07"]
    assert 77_777 in set(frame["seed"])
    assert len(frame) == _NUM_RUNS - 1
    records_read.clear()
    load_runs([runs])
    assert records_read == []


def test_config_of_a_record_counts_as_a_part_of_it(runs: Path, records_read: list[str]) -> None:
    load_runs([runs])
    records_read.clear()
    (runs / "study-002" / "run-03" / "config.yaml").write_text("name: another, longer\n")
    load_runs([runs])
    assert records_read == ["study-002/run-03"]


def test_damaged_record_is_named_every_time(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "study-001" / "run-07" / "result.json").write_text("{")
    for _ in range(2):
        assert len(load_runs([runs])) == _NUM_RUNS - 1
        assert "run-07" in capsys.readouterr().err


def test_folder_is_told_as_it_was_given(
    runs: Path, records_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_runs([runs])
    records_read.clear()
    monkeypatch.chdir(runs.parent)
    assert load_runs(["runs"])["folder"].iloc[0] == "runs/study-000/run-00"
    assert records_read == []


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", bytes(3_000)], ids=["empty", "cut", "zeros"])
def test_damaged_cache_is_as_good_as_none(runs: Path, records_read: list[str], content: bytes) -> None:
    cold = load_runs([runs])
    cache_file([runs]).write_bytes(content)
    records_read.clear()
    assert_frame_equal(load_runs([runs]), cold)
    assert len(records_read) == _NUM_RUNS
    records_read.clear()
    load_runs([runs])
    assert records_read == []


def test_another_parquet_file_is_as_good_as_none(runs: Path, records_read: list[str]) -> None:
    pd.DataFrame({"folder": ["x"]}).to_parquet(_made(cache_file([runs])))
    assert len(load_runs([runs])) == len(records_read) == _NUM_RUNS


def test_unwritable_cache_is_no_error(runs: Path, cache_home: Path, records_read: list[str]) -> None:
    cache_home.write_text("a file where the folder should be")
    for _ in range(2):
        assert len(load_runs([runs])) == _NUM_RUNS
    assert len(records_read) == 2 * _NUM_RUNS


def test_cache_of_other_code_is_not_used(
    runs: Path, records_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_runs([runs])
    records_read.clear()
    monkeypatch.setattr(record_cache, "_MAKES_ROWS", (load,))
    load_runs([runs])
    assert len(records_read) == _NUM_RUNS


def test_few_runs_leave_no_cache(tmp_path: Path, cache_home: Path) -> None:
    write_many_runs(tmp_path / "runs", MIN_RECORDS - 1)
    load_runs([tmp_path / "runs"])
    assert not cache_home.exists()


def test_default_place_is_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file(["a"]).parent == tmp_path / ".cache" / "snell-scale"
    assert cache_file(["a", "b"]) == cache_file(["b", "a"])
    assert cache_file(["a"]) != cache_file(["b"])


@pytest.mark.slow
def test_ten_thousand_runs_take_ten_seconds_at_most(tmp_path: Path) -> None:
    write_many_runs(tmp_path / "runs", 10_000)
    seconds = []
    for _ in ("cold", "warm"):
        started = time.perf_counter()
        assert len(load_runs([tmp_path / "runs"])) == 10_000
        seconds.append(time.perf_counter() - started)
    assert max(seconds) <= 10, seconds


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path
