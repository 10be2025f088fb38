"""A run killed with SIGKILL at random instants continues with the losses of an unbroken one."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snell_scale.records import read_result, read_steps

_KILLS = 5


def start(config: Path, name: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "snell_scale.cli",
        "run",
        str(config),
        f"name={name}",
        "--resume",
        "auto",
        "--quiet",
    ]
    settings = ["training.steps=60", "checkpoint.every_steps=3"]
    return subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_five_kills(tiny_file: Path) -> None:
    runs = tiny_file.parent / "runs"
    assert start(tiny_file, "whole").wait(timeout=120) == 0
    generator = random.Random(0)
    kill_steps = sorted(generator.sample(range(5, 55), _KILLS))
    for kill_step in kill_steps:
        process = start(tiny_file, "broken")
        deadline = time.monotonic() + 120
        while len(read_steps(runs / "broken")) == 0 or read_steps(runs / "broken")[-1]["step"] < kill_step:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (runs / "broken" / "result.json").exists()
    assert start(tiny_file, "broken").wait(timeout=120) == 0
    whole, broken = (
        [
            (line["step"], line["loss"])
            for line in read_steps(runs / name)
            if "loss" in line and "split" not in line
        ]
        for name in ("whole", "broken")
    )
    assert broken == whole
    result = read_result(runs / "broken")
    assert result.metrics == read_result(runs / "whole").metrics
