"""A signal to one rank stops all after one step, with a checkpoint; as many ranks, or others, go on from it."""

from pathlib import Path
from typing import NamedTuple

import pytest

from snell_scale.records import Result, read_result, read_steps
from tests.faults.ranks_by_hand import Ended, RanksByHand
from tests.faults.worker import Fault

_LONGEST_SECONDS = 150.0  # of any of these, when they share the cores with others
_AT_A_TIME = 4
_NO_DROPOUT = "model.arguments.proj_drop_rate=0.0"


class _Scenario(NamedTuple):
    """A run on `before` ranks that a fault stops, and goes on with `after` ranks, and perhaps another engine."""

    faults: list[Fault]
    settings: list[str]
    before: int = 2
    after: int = 2
    engines: tuple[str, str] = ("ddp", "ddp")


_ZERO3 = ["engine.name=deepspeed", "engine.zero_stage=3"]
_SCENARIOS = {
    "whole": _Scenario([], []),
    "terminated": _Scenario([Fault("terminate", 1)], []),
    "warned": _Scenario([Fault("warn", 0)], ["checkpoint.asynchronous=true"]),
    "whole-zero3": _Scenario([], _ZERO3),
    "zero3": _Scenario([Fault("terminate", 1)], _ZERO3),
    "whole-no-dropout": _Scenario([], [_NO_DROPOUT]),
    "two-one": _Scenario([Fault("terminate", 1)], [_NO_DROPOUT], 2, 1),
    "one-two": _Scenario([Fault("terminate", 0)], [_NO_DROPOUT], 1, 2),
    "fsdp2-single": _Scenario([Fault("terminate", 1)], [_NO_DROPOUT], 2, 1, ("fsdp2", "single")),
    "single-fsdp2": _Scenario([Fault("terminate", 0)], [_NO_DROPOUT], 1, 2, ("single", "fsdp2")),
    "ddp-deepspeed": _Scenario([Fault("terminate", 1)], [_NO_DROPOUT], 2, 2, ("ddp", "deepspeed")),
}


class _Course(NamedTuple):
    """How a scenario's first attempt ended, with its record, and how the second did."""

    first: Ended
    record: Result
    second: Ended


@pytest.fixture(scope="module")
def courses(runs: Path) -> dict[str, _Course]:
    """What became of every scenario."""
    first = _run_all(runs, again=False)
    records = {name: read_result(runs / name) for name in _SCENARIOS}
    second = _run_all(runs, again=True)
    return {name: _Course(first[name], records[name], second[name]) for name in _SCENARIOS}


def _run_all(runs: Path, *, again: bool) -> dict[str, Ended]:
    """A few at a time: all of them share the cores."""
    ended, names = {}, list(_SCENARIOS)
    for first in range(0, len(names), _AT_A_TIME):
        some = {name: _SCENARIOS[name] for name in names[first : first + _AT_A_TIME]}
        started = {
            name: _start(runs, name, world_size=s.after if again else s.before, again=again)
            for name, s in some.items()
        }
        ended |= {name: ranks.end(within_seconds=_LONGEST_SECONDS) for name, ranks in started.items()}
    return ended


def _start(runs: Path, name: str, *, world_size: int, again: bool = False) -> RanksByHand:
    scenario = _SCENARIOS[name]
    arguments = ["run", str(runs / "tiny.yaml"), f"name={name}", f"engine.name={scenario.engines[again]}"]
    arguments += ["engine.cpu_threads=1", *scenario.settings, "--quiet", "--resume", "auto"]
    faults = [] if again else scenario.faults
    return RanksByHand(arguments, faults, logs=runs / f"{name}-{again}", world_size=world_size)


def _losses(runs: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_steps(runs / name) if "split" not in line]


@pytest.mark.parametrize("name", ["terminated", "warned"])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(courses: dict[str, _Course], name: str) -> None:
    first, record, _ = courses[name]
    assert first.codes == [75, 75], first.output
    # Asked during step 4: the vote before step 5 is counted before step 6.
    assert (record.status, record.steps) == ("interrupted", 5)


@pytest.mark.parametrize(
    ("name", "whole"), [("terminated", "whole"), ("warned", "whole"), ("zero3", "whole-zero3")]
)
def test_the_run_goes_on_as_if_it_had_not_been_stopped(
    courses: dict[str, _Course], runs: Path, name: str, whole: str
) -> None:
    assert courses[whole].first.codes == [0, 0], courses[whole].first.output
    assert courses[name].second.codes == [0, 0], courses[name].second.output
    result = read_result(runs / name)
    assert result.resumed_from_steps == [5]
    assert len(_losses(runs, whole)) == 8
    assert _losses(runs, name) == _losses(runs, whole)  # bit-identical: the same arithmetic in the same order
    assert result.metrics == read_result(runs / whole).metrics


@pytest.mark.parametrize(
    ("name", "stopped_after"), [("two-one", 5), ("one-two", 4), ("fsdp2-single", 5), ("single-fsdp2", 4)]
)
def test_another_number_of_ranks_or_engine_goes_on(
    courses: dict[str, _Course], runs: Path, name: str, stopped_after: int
) -> None:
    """Without dropout: every rank draws masks of its own."""
    first, record, second = courses[name]
    assert set(first.codes) == {75}, first.output
    assert record.steps == stopped_after
    assert set(second.codes) == {0}, second.output
    whole, changed = _losses(runs, "whole-no-dropout"), _losses(runs, name)
    assert [step for step, _ in changed] == list(range(1, 9))
    for (_, expected), (_, loss) in zip(whole, changed, strict=True):
        # Sums in another order: fp32 rounding (6e-8) over eight Adam steps, which divide by small moments.
        assert abs(loss - expected) <= 2e-4 * abs(expected)


def test_a_checkpoint_that_the_new_engine_cannot_read_is_refused(courses: dict[str, _Course]) -> None:
    _, record, second = courses["ddp-deepspeed"]
    assert record.steps == 5
    assert second.codes == [2, 2], second.output
    assert "was written by torch on 2 rank(s), but this run is deepspeed zero-2 on 2" in second.output[0]
    assert "--overwrite" in second.output[0]
