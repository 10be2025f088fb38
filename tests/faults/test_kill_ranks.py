"""One rank of two is killed with SIGKILL at random instants; torchrun's restarts end with the unbroken losses."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import yaml

from snell_scale.records import read_result, read_steps
from tests.conftest import TINY

_Found = TypeVar("_Found")
_STEPS = 200
_STEPS_OF_A_GROUP = 4  # a fast machine must not end the run before the last kill
_RESTART_SECONDS = 180.0
_AIMS = ("training", "save", "save", "start")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a kill costs the restart of two processes: 10 s, more where cores are shared
@pytest.mark.parametrize(("engine", "num_kills"), [("ddp", 20), ("fsdp2", 5), ("deepspeed", 5)])
def test_killed_ranks_are_restarted_and_lose_nothing(tmp_path: Path, engine: str, num_kills: int) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path)}))
    with _torchrun(tmp_path, "whole", engine) as whole:
        assert whole.wait(timeout=_RESTART_SECONDS) == 0
    kills: list[tuple[str, int, bool]] = []
    generator = random.Random(0)
    with _torchrun(tmp_path, "broken", engine) as agent:
        killed: set[int] = set()
        for number in range(num_kills):
            aim = _AIMS[number % len(_AIMS)]
            killed |= _kill_one(agent, tmp_path / "broken", killed, aim=aim, generator=generator, kills=kills)
        assert agent.wait(timeout=_RESTART_SECONDS) == 0
    print(f"{engine}: (aim, rank, inside a save) of the kills: {kills}")
    assert len(kills) == num_kills
    assert {rank for _, rank, _ in kills} == {0, 1}
    assert any(inside_a_save for _, _, inside_a_save in kills)
    assert _losses(tmp_path / "broken") == _losses(tmp_path / "whole")  # bit-identical
    assert len(_losses(tmp_path / "whole")) == _STEPS
    broken = read_result(tmp_path / "broken")
    assert broken.metrics == read_result(tmp_path / "whole").metrics
    assert broken.resumed_from_steps


@contextmanager
def _torchrun(folder: Path, name: str, engine: str) -> Iterator[subprocess.Popen[bytes]]:
    settings = [f"name={name}", f"engine.name={engine}", "engine.cpu_threads=1", f"training.steps={_STEPS}"]
    settings += ["checkpoint.every_steps=1", "evaluation.every_steps=40"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "30", "--module", "snell_scale.cli", "run", str(folder / "tiny.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (folder / f"{name}.log").open("wb") as log:
        agent = subprocess.Popen(
            [*command, *settings, "--quiet", "--resume", "auto"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            yield agent
        finally:
            for process in [*_children(agent), agent]:
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    process.kill()
            agent.wait()


def _kill_one(
    agent: subprocess.Popen[bytes],
    run: Path,
    killed: set[int],
    *,
    aim: str,
    generator: random.Random,
    kills: list[tuple[str, int, bool]],
) -> set[int]:
    """Kill a rank of the group that is not `killed`, at the instant that `aim` says; returns that group."""
    group = _until(agent, lambda: _new_group(agent, killed))
    if aim == "start":
        _linger(run, generator.uniform(0.0, 10.0))  # imports, joining, reading the checkpoint, the first steps
    else:
        before = _last_step(run)
        _until(agent, lambda: _last_step(run) > before)
        _linger(run, generator.uniform(0.0, 0.3))
    if aim == "save":
        _until(agent, lambda: any(run.glob("checkpoints/.step-*.partial")))
        time.sleep(generator.uniform(0.0, 0.01))
    rank = generator.randrange(2)
    group[rank].send_signal(signal.SIGKILL)
    kills.append((aim, rank, any(run.glob("checkpoints/.step-*.partial"))))
    return {process.pid for process in group}


def _linger(run: Path, seconds: float) -> None:
    """So long, or until some steps are done."""
    deadline, last = time.monotonic() + seconds, _last_step(run) + _STEPS_OF_A_GROUP
    while time.monotonic() < deadline and _last_step(run) < last:
        time.sleep(0.001)


def _new_group(agent: subprocess.Popen[bytes], killed: set[int]) -> list[psutil.Process]:
    """The two ranks in order, once none of an earlier group is left."""
    ranks = []
    for process in _children(agent):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            rank = process.environ().get("RANK")
            if rank is not None:
                ranks.append((int(rank), process))
    ranks.sort(key=lambda entry: entry[0])
    complete = [rank for rank, _ in ranks] == [0, 1] and not killed & {process.pid for _, process in ranks}
    return [process for _, process in ranks] if complete else []


def _children(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(agent.pid).children()
    return []


def _until(agent: subprocess.Popen[bytes], happens: Callable[[], _Found]) -> _Found:
    deadline = time.monotonic() + _RESTART_SECONDS
    while True:
        found = happens()
        if found:
            return found
        assert agent.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _last_step(run: Path) -> int:
    lines = read_steps(run)
    return lines[-1]["step"] if lines else 0


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_steps(run) if "split" not in line]
