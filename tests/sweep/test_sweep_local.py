"""A sweep on this machine: runs of every kind; stopped, preempted, and continued."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from analysis.load import load_runs
from snell_scale import registry
from snell_scale.compare import plan_study
from snell_scale.records import read_result, read_steps
from snell_scale.run import run
from tests.stopping import stop_in_step
from tests.sweep.planned import Call, folder_of, record


def test_runs_of_every_kind(tiny_file: Path, snell: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = yaml.safe_load(tiny_file.read_text())
    raw["checkpoint"]["every_steps"] = None
    raw["cases"] = {
        "done": {},
        "interrupted": {},
        # A weight of 2^43 bytes, which no host has.
        "oom": {"model.arguments.embed_dim": 2**20, "model.arguments.depth": 1},
        "broken": {"method.targets": "nothing_like_this"},
    }
    tiny_file.write_text(yaml.safe_dump(raw, sort_keys=False))
    runs = plan_study([tiny_file], grid={}, overrides=[], name="s", config_class=registry.config_class)
    record(runs[0], "ok")
    stop_in_step(monkeypatch, 3)
    assert run(runs[1].config, quiet=True).status == "interrupted"
    options = ("--executor", "local", "--name", "s", "--jobs", "3")
    code, out, err = snell("sweep", tiny_file, *options)
    assert code == 1, out + err
    results = {planned.varied["case"]: read_result(folder_of(planned)) for planned in runs}
    assert {case: result.status for case, result in results.items()} == {
        "done": "ok", "interrupted": "ok", "oom": "oom", "broken": "failed",
    }  # fmt: skip
    assert results["done"].steps == 0  # as it was written above
    assert (results["interrupted"].steps, results["interrupted"].resumed_from_steps) == (8, [3])
    assert results["oom"].varied == {"case": "oom"}
    assert "nothing_like_this" in (results["broken"].message or "")
    assert out.count("s/broken") >= 2  # while it ran, and in the table
    study = folder_of(runs[0]).parent
    assert load_runs([study])["name"].tolist() == ["s/broken", "s/done", "s/interrupted", "s/oom"]


def start_long_sweep(tiny_file: Path, *, seeds: str) -> subprocess.Popen[bytes]:
    """Two runs at a time, under way when this returns."""
    options = [
        "--executor",
        "local",
        "--name",
        "s",
        "--jobs",
        "2",
        "--set",
        "training.steps=400",
        "checkpoint.every_steps=null",
    ]
    options += ["--grid", f"seeds={seeds}"]
    words = [sys.executable, "-m", "snell_scale.cli", "sweep", str(tiny_file), *options]
    process = subprocess.Popen(words, start_new_session=True)
    study = tiny_file.parent / "runs" / "s"
    wait_until(lambda: all(len(read_steps(study / f"seed{seed}")) > 20 for seed in (0, 1)), process)
    return process


def wait_until(done: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120  # two starts of Python and torch, on a busy machine
    while not done():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)


def processes_of(tiny_file: Path) -> list[psutil.Process]:
    """The processes that work for a sweep of this file: their command lines name its folder."""
    folder = str(tiny_file.parent)
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if folder in " ".join(process.info["cmdline"] or [])]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_saves_and_continues(tiny_file: Path, snell: Call, number: int) -> None:
    process = start_long_sweep(tiny_file, seeds="0,1,2")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) == 75
    study = tiny_file.parent / "runs" / "s"
    assert [read_result(study / f"seed{seed}").status for seed in (0, 1)] == ["interrupted"] * 2
    assert not (study / "seed2").exists()
    assert not processes_of(tiny_file)
    process = subprocess.Popen(process.args)
    assert process.wait(timeout=200) == 0
    assert [read_result(study / f"seed{seed}").status for seed in range(3)] == ["ok"] * 3
    assert read_result(study / "seed0").resumed_from_steps


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_continues(tiny_file: Path) -> None:
    process = start_long_sweep(tiny_file, seeds="0,1")
    jobs = [other for other in processes_of(tiny_file) if "submitit.core._submit" in other.cmdline()]
    assert len(jobs) == 2
    jobs[0].send_signal(signal.SIGUSR2)
    assert process.wait(timeout=200) == 0
    study = tiny_file.parent / "runs" / "s"
    results = [read_result(study / f"seed{seed}") for seed in (0, 1)]
    assert [result.status for result in results] == ["ok", "ok"]
    assert sorted(len(result.resumed_from_steps) for result in results) == [0, 1]
    assert not processes_of(tiny_file)
