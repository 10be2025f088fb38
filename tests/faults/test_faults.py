"""One rank of two fails, hangs or is killed: both end, with one record that says why."""

import re
import signal
import time
from pathlib import Path

import pytest

from snell_scale.engines.checkpoint import find_damage
from snell_scale.records import Result, read_result
from tests.faults.ranks_by_hand import Ended, RanksByHand
from tests.faults.worker import Fault

_TIMEOUT_SECONDS = 4
# Of a run that ends by itself: all of them share the cores, and start with 5 s of imports.
_LONGEST_SECONDS = 150.0
_HANGING = [f"engine.timeout_seconds={_TIMEOUT_SECONDS}"]
_AT_A_TIME = 4
_ZERO3 = ["engine.name=deepspeed", "engine.zero_stage=3"]
# name → (faults, settings, a rank that ends by no means of its own)
_SCENARIOS: dict[str, tuple[list[Fault], list[str], int | None]] = {
    "whole": ([], [], None),
    "out-of-memory": ([Fault("out of memory", 1)], [], None),
    "out-of-memory-unheard": ([Fault("out of memory", 1), Fault("deaf", 0)], [], None),
    "out-of-memory-fsdp2": ([Fault("out of memory", 1)], ["engine.name=fsdp2"], None),
    "out-of-memory-zero3": ([Fault("out of memory", 1)], _ZERO3, None),
    "diverged": ([Fault("not finite", 1)], [], None),
    "diverged-fsdp2": ([Fault("not finite", 1)], ["engine.name=fsdp2"], None),
    "diverged-zero3": ([Fault("not finite", 1)], _ZERO3, None),
    "bug": ([Fault("bug", 1)], [], None),
    "refused": ([Fault("refuse", 1)], [], None),
    "disk-full": ([Fault("disk full", 1)], [], None),
    "disk-full-zero3": ([Fault("disk full", 1)], _ZERO3, None),
    "killed": ([Fault("kill", 0)], [], None),
    "killed-unheard": ([Fault("kill", 0), Fault("deaf", 1)], [], None),
    "sleeping": ([Fault("sleep", 1)], _HANGING, None),
    "frozen": ([Fault("stop", 1)], _HANGING, 1),
    "frozen-store": ([Fault("stop", 0)], _HANGING, 0),
    "suspended": ([Fault("stop", 0), Fault("stop", 1)], _HANGING, None),
}


@pytest.fixture(scope="module")
def ended(runs: Path) -> dict[str, Ended]:
    """How each scenario ended: several run at a time, for those that hang only wait."""
    found: dict[str, Ended] = {}
    names = list(_SCENARIOS)
    for first in range(0, len(names), _AT_A_TIME):
        started = {name: _start(runs, name) for name in names[first : first + _AT_A_TIME]}
        if "suspended" in started:
            started["suspended"].wait_until_stopped(within_seconds=_LONGEST_SECONDS)
            time.sleep(_TIMEOUT_SECONDS + 2)
            started["suspended"].send(signal.SIGCONT)
        for name, ranks in started.items():
            found[name] = ranks.end(within_seconds=_LONGEST_SECONDS, may_remain=_SCENARIOS[name][2])
    return found


def _start(runs: Path, name: str) -> RanksByHand:
    faults, settings, _ = _SCENARIOS[name]
    arguments = ["run", str(runs / "tiny.yaml"), f"name={name}", "engine.name=ddp", "engine.cpu_threads=1"]
    return RanksByHand([*arguments, *settings, "--quiet"], faults, logs=runs / name)


def _record(runs: Path, name: str) -> Result:
    return read_result(runs / name)


def test_without_a_fault_both_end_well(ended: dict[str, Ended], runs: Path) -> None:
    assert ended["whole"].codes == [0, 0]
    assert _record(runs, "whole").status == "ok"
    assert "TCPStore" not in "".join(ended["whole"].output)  # no rank talks to one that has left


@pytest.mark.parametrize(
    "name", ["out-of-memory", "out-of-memory-unheard", "out-of-memory-fsdp2", "out-of-memory-zero3"]
)
def test_out_of_memory_on_one_rank_is_a_result_of_both(ended: dict[str, Ended], runs: Path, name: str) -> None:
    assert ended[name].codes == [3, 3], ended[name].output
    record = _record(runs, name)
    assert record.status == "oom"
    assert record.message is not None
    assert record.message.startswith("rank 1: ")
    assert (record.steps, record.total_steps) == (3, 8)


@pytest.mark.parametrize("name", ["diverged", "diverged-fsdp2", "diverged-zero3"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(ended: dict[str, Ended], runs: Path, name: str) -> None:
    assert ended[name].codes == [4, 4], ended[name].output
    record = _record(runs, name)
    assert record.status == "diverged"
    assert record.divergence is not None
    assert record.divergence["step"] == 4
    # DeepSpeed leaves out a step whose gradients are not finite: no parameter is broken.
    assert bool(record.divergence["parameters"]) == (name != "diverged-zero3")
    assert record.divergence["groups"]


def test_a_bug_on_one_rank_ends_the_other_with_its_message(ended: dict[str, Ended], runs: Path) -> None:
    assert ended["bug"].codes == [1, 1]
    assert "ended because rank 1 failed: KeyError: 'a bug'" in ended["bug"].output[0]
    assert "Traceback" not in ended["bug"].output[0]
    assert "Traceback" in ended["bug"].output[1]
    assert _record(runs, "bug").message == "rank 1: KeyError: 'a bug'"


def test_what_one_rank_refuses_has_the_exit_code_of_both(ended: dict[str, Ended], runs: Path) -> None:
    """So that a launcher that starts crashed ranks again does not start these."""
    assert ended["refused"].codes == [2, 2], ended["refused"].output
    assert "ended because rank 1 failed: ValueError: a bad value" in ended["refused"].output[0]
    assert _record(runs, "refused").message == "rank 1: ValueError: a bad value"


@pytest.mark.parametrize("name", ["disk-full", "disk-full-zero3"])
def test_a_full_disk_leaves_the_checkpoint_before(ended: dict[str, Ended], runs: Path, name: str) -> None:
    assert ended[name].codes == [2, 2], ended[name].output
    record = _record(runs, name)
    assert (record.status, record.steps) == ("failed", 4)
    for text in (*ended[name].output, record.message or ""):
        assert "[Errno 28] No space left on device" in text
        assert "rank 1" in text
        assert "step 4" in text
    checkpoints = runs / name / "checkpoints"
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-00000002"]
    assert find_damage(checkpoints / "step-00000002") is None


@pytest.mark.parametrize("name", ["killed", "killed-unheard"])
def test_the_death_of_the_rank_with_the_store_ends_the_other(
    ended: dict[str, Ended], runs: Path, name: str
) -> None:
    assert ended[name].codes == [-signal.SIGKILL, 1], ended[name].output
    assert "gone" in ended[name].output[1]
    assert "Traceback" not in ended[name].output[1]
    assert not (runs / name / "result.json").exists()


def test_a_rank_that_hangs_ends_the_job(ended: dict[str, Ended], runs: Path) -> None:
    assert ended["sleeping"].codes == [1, 1]
    message = _record(runs, "sleeping").message or ""
    for text in (*ended["sleeping"].output, message):
        assert f"no progress for {_TIMEOUT_SECONDS} s (engine.timeout_seconds)" in text
        assert "rank 1 is at step 3, in _sleep (faults/worker.py:" in text
        assert "rank 0 is at step 3, in " in text


def test_a_job_that_was_suspended_as_a_whole_goes_on(ended: dict[str, Ended], runs: Path) -> None:
    assert ended["suspended"].codes == [0, 0], ended["suspended"].output
    assert _record(runs, "suspended").status == "ok"


@pytest.mark.parametrize(("name", "frozen"), [("frozen", 1), ("frozen-store", 0)])
def test_a_frozen_rank_ends_the_others(ended: dict[str, Ended], name: str, frozen: int) -> None:
    other = 1 - frozen
    assert (ended[name].codes[frozen], ended[name].codes[other]) == (None, 1)
    # What stops within its first second, with the store, is never heard.
    silence = rf"rank {frozen} (was at step \d, in .* \(no sign of life for|gave no sign of life)"
    assert re.search(silence, ended[name].output[other])
