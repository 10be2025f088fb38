"""The memory snapshot: of the measured step, of the moment memory runs out, and nowhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from snell_scale.config import Config
from snell_scale.instrument.snapshot import MemorySnapshot
from snell_scale.run import run

CUDA = torch.device("cuda", 0)


class Recorder:
    """In place of torch's functions: what was asked of them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self.record)
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", self.dump)

    def record(self, enabled: str | None, **settings: Any) -> None:
        self.asked.append("stop" if enabled is None else f"record on {settings['device']}")

    def dump(self, path: str) -> None:
        self.asked.append("dump")
        Path(path).write_bytes(b"blocks")


def test_the_measured_step_is_written_and_then_nothing_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    recorder, snapshot = Recorder(monkeypatch), MemorySnapshot(CUDA, tmp_path)
    with snapshot.recording():
        snapshot.take()
        assert recorder.asked == ["record on cuda:0", "dump", "stop"]
    assert (tmp_path / "memory_snapshot.pickle").read_bytes() == b"blocks"
    assert recorder.asked[-1] == "stop"


def _runs_out(snapshot: MemorySnapshot) -> None:
    with snapshot.recording():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_where_memory_runs_out_it_is_written_and_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    recorder, snapshot = Recorder(monkeypatch), MemorySnapshot(CUDA, tmp_path, rank=1, world_size=2)
    with pytest.raises(torch.OutOfMemoryError):
        _runs_out(snapshot)
    assert recorder.asked == ["record on cuda:0", "dump", "stop"]
    assert [path.name for path in tmp_path.iterdir()] == ["memory_snapshot-oom-rank1.pickle"]


def test_the_measured_step_is_kept_where_memory_runs_out_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    Recorder(monkeypatch)
    snapshot = MemorySnapshot(CUDA, tmp_path)

    def run_out_after_the_measured_step() -> None:
        with snapshot.recording():
            snapshot.take()
            (tmp_path / "memory_snapshot.pickle").write_bytes(b"the measured step")
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run_out_after_the_measured_step()
    assert (tmp_path / "memory_snapshot.pickle").read_bytes() == b"the measured step"
    assert (tmp_path / "memory_snapshot-oom.pickle").read_bytes() == b"blocks"


def test_another_failure_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    recorder, snapshot = Recorder(monkeypatch), MemorySnapshot(CUDA, tmp_path)
    with pytest.raises(KeyError), snapshot.recording():
        raise KeyError("a bug")
    assert recorder.asked == ["record on cuda:0", "stop"]


def test_a_full_disk_does_not_hide_that_memory_ran_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    Recorder(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        _runs_out(MemorySnapshot(CUDA, tmp_path / "no such folder"))
    assert "no memory snapshot:" in capsys.readouterr().err


def test_a_torch_without_these_functions_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delattr(torch.cuda.memory, "_dump_snapshot")
    snapshot = MemorySnapshot(CUDA, tmp_path)
    with snapshot.recording():
        snapshot.take()
    assert capsys.readouterr().err.count("logging.memory_snapshot does nothing: torch") == 1
    MemorySnapshot(CUDA, tmp_path, rank=1, world_size=2)
    assert capsys.readouterr().err == ""


def test_on_cpu_a_run_says_so_and_goes_on(tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]):
    config = tiny("logging.memory_snapshot=true")
    assert run(config, quiet=True).status == "ok"
    assert "logging.memory_snapshot does nothing: there is no CUDA allocator on cpu" in capsys.readouterr().err
    assert not list((Path(config.output_dir) / config.name).glob("memory_snapshot*"))


def test_a_run_that_is_done_anew_leaves_no_snapshot_of_before(tiny: Callable[..., Config]):
    config = tiny()
    folder = Path(config.output_dir) / config.name
    run(config, quiet=True)
    for name in ("memory_snapshot.pickle", "memory_snapshot-rank1.pickle"):
        (folder / name).write_bytes(b"of before")
    assert run(config, overwrite=True, quiet=True).status == "ok"
    assert not list(folder.glob("memory_snapshot*"))


def test_a_run_asks_for_it_after_its_measured_step(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch):
    taken: list[int] = []
    monkeypatch.setattr(MemorySnapshot, "take", lambda _: taken.append(1))
    assert run(tiny("logging.memory_snapshot=true"), quiet=True).status == "ok"
    assert taken == [1]
    assert run(tiny("name=without"), quiet=True).status == "ok"
    assert taken == [1]
