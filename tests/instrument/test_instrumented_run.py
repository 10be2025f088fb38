"""What a run records of its memory, speed and FLOPs, however it ends, and what measuring costs timed steps."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from snell_scale.config import Config
from snell_scale.engines.single import SingleEngine
from snell_scale.instrument.allocator import AllocatorMeter
from snell_scale.instrument.flops import FlopCounter
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.instrument.throughput import StepTimer
from snell_scale.records import Result, read_result
from snell_scale.run import run
from tests.instrument.memory_cases import make_mlp
from tests.stopping import stop_in_step

MakeConfig = Callable[..., Config]

# One optimizer step of ViT-B/16, batch 32, on a GPU of today; on a CPU it takes a hundred times as long.
_STEP_MS = 30.0


def recorded(config: Config) -> Result:
    return read_result(Path(config.output_dir) / config.name)


def test_a_run_records_speed_flops_and_every_ranks_memory(tiny: MakeConfig):
    config = tiny("training.steps=12")
    run(config, quiet=True)
    result = recorded(config)
    assert result.memory is not None
    assert result.flops is not None
    memory: dict[str, Any] = dict(result.memory)
    (alone,) = memory.pop("ranks")
    assert alone == memory
    assert memory["rank"] == 0
    assert memory["allocator"] is None
    assert memory["host"]["peak_rss_bytes"] > memory["peak"]["total_bytes"] > 0
    speed = result.throughput
    assert speed["images_per_s_per_device"] == speed["images_per_s"]
    percentiles = [speed[f"step_ms_{name}"] or 0.0 for name in ("p10", "median", "p90", "p99")]
    assert 0 < percentiles[0] <= percentiles[1] <= percentiles[2] <= percentiles[3]
    assert 0 < (speed["data_wait_percent"] or 0.0) < 100
    # Steps 3 to 12, without the third, which is the measured one.
    assert speed["num_timed_steps"] == 9
    assert result.flops["model_flops"] == result.flops["hardware_flops"] - _attention_again()
    assert result.flops["kernel_flops"] > 0
    assert (result.flops["mfu"], result.flops["hfu"]) == (None, None)  # of a CPU no peak is known
    made = datetime.fromisoformat(result.created_at or "")
    assert timedelta(0) <= datetime.now(timezone.utc) - made < timedelta(minutes=10)
    assert result.conditions["image_size"] == [8, 8]
    assert result.conditions["allocator"] == "cpu"


def _attention_again() -> int:
    """The scores that backward computes again: 2 blocks, 8 images, 2 heads of 8, 16 patches and a class token."""
    return 2 * 8 * 2 * (2 * 17 * 17 * 8)


def test_checkpointing_raises_hardware_flops_only(tiny: MakeConfig):
    plain = run(tiny("name=plain"), quiet=True).flops
    again = run(tiny("name=again", "training.activation_checkpointing=true"), quiet=True).flops
    assert plain is not None
    assert again is not None
    assert again["model_flops"] == plain["model_flops"]
    # Of the three products of each adapted layer one is forward's, and the blocks are nearly all of the model.
    assert again["hardware_flops"] > 1.25 * plain["hardware_flops"]


def test_gradient_accumulation_changes_no_flop(tiny: MakeConfig):
    whole = run(tiny("name=whole"), quiet=True).flops or {}
    parts = run(tiny("name=parts", "training.gradient_accumulation=2"), quiet=True).flops or {}
    assert parts["model_flops"] == whole["model_flops"]
    assert parts["kernel_flops"] == 2 * whole["kernel_flops"]  # each microbatch merges anew


def test_compiled_code_has_no_flop_count(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)
    assert run(tiny("training.compile=true"), quiet=True).flops is None


@pytest.mark.parametrize("failing_step", [1, 3, 5])
def test_out_of_memory_leaves_what_this_rank_knows(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, failing_step: int
):
    original, count = SingleEngine.backward, 0

    def exhausted(self: SingleEngine, loss: Tensor) -> None:
        nonlocal count
        count += 1
        if count == failing_step:
            torch.empty(2**62, dtype=torch.uint8)
        original(self, loss)

    monkeypatch.setattr(SingleEngine, "backward", exhausted)
    config = tiny()
    run(config, quiet=True)
    result = recorded(config)
    assert result.status == "oom"
    assert result.memory is not None
    assert [report["rank"] for report in result.memory["ranks"]] == [0]
    assert result.memory["phases"]["load"]["parameters_bytes"] > 0
    assert result.memory["host"]["rss_bytes"] > 0
    # Nothing of a step was measured before the third; of the third, up to where it failed.
    measured = {1: {"load"}, 3: {"load", "forward", "backward"}, 5: {"load", "forward", "backward", "step"}}
    assert result.memory["phases"].keys() == measured[failing_step]
    assert bool(result.memory["peak"]) == (failing_step > 1)
    assert (result.flops is not None) == (failing_step == 5)


def test_an_interrupted_run_and_its_resumption_keep_what_was_measured(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
):
    config = tiny("logging.memory_at_step=2")
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert run(config, quiet=True).status == "interrupted"
    first = recorded(config)
    assert first.memory is not None
    assert first.memory["peak"]["total_bytes"] > 0
    assert first.flops is not None
    assert len(first.memory["ranks"]) == 1
    with monkeypatch.context() as patch:
        stop_in_step(patch, 1)  # before this attempt has measured anything
        assert run(config, resume="auto", quiet=True).status == "interrupted"
    second = recorded(config)
    assert second.memory is not None
    assert second.memory["peak"] == first.memory["peak"]
    assert second.flops == first.flops


def test_a_run_without_a_measured_step_has_no_peak(tiny: MakeConfig):
    result = run(tiny("logging.memory_at_step=null"), quiet=True)
    assert result.memory is not None
    assert result.memory["peak"] == {}
    assert result.memory["phases"].keys() == {"load"}
    assert result.flops is None


def test_counting_flops_beside_the_probe_changes_neither():
    module, x = make_mlp(), torch.ones(5, 4)

    def step(probe: MemoryProbe, flops: FlopCounter | None) -> dict[str, Any]:
        with probe:
            with probe.phase("forward"):
                loss = _counted(flops, lambda: module(x).sum())
            with probe.phase("backward"):
                _counted(flops, loss.backward)
        module.zero_grad()
        return probe.report()["phases"]

    flops = FlopCounter()
    assert step(MemoryProbe(module), None) == step(MemoryProbe(module), flops)
    assert flops.report()["hardware_flops"] == 2 * 5 * (2 * 4 * 8 + 3 * 8 * 3)


def _counted(flops: FlopCounter | None, part: Callable[[], Any]) -> Any:
    if flops is None:
        return part()
    with flops:
        return part()


def test_nothing_watches_the_timed_steps(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    """What slows a step, modes that see every operation, runs in the measured one alone, which is not timed."""
    num_modes: list[int] = []
    is_timed: list[bool] = []
    backward, stop = SingleEngine.backward, StepTimer.stop

    def watching(engine: SingleEngine, loss: Tensor) -> None:
        num_modes.append(len(_get_current_dispatch_mode_stack()))
        backward(engine, loss)

    def stopping(timer: StepTimer, num_images: int, *, timed: bool = True) -> None:
        is_timed.append(timed)
        stop(timer, num_images, timed=timed)

    monkeypatch.setattr(SingleEngine, "backward", watching)
    monkeypatch.setattr(StepTimer, "stop", stopping)
    run(tiny("logging.memory_at_step=3"), quiet=True)
    assert [step for step, count in enumerate(num_modes, 1) if count] == [3]
    assert [step for step, each in enumerate(is_timed, 1) if not each] == [3]
    assert len(is_timed) == len(num_modes) > 3


def test_what_runs_between_timed_steps_costs_less_than_a_hundredth_of_one(monkeypatch: pytest.MonkeyPatch):
    """The timer, and a GPU's allocator asked for its counters: some hundred of them in dictionaries."""
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {})
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: _counters())
    timer, allocator = StepTimer(torch.device("cpu"), 0), AllocatorMeter(torch.device("cuda", 0))
    num_steps = 2000

    def seconds() -> float:
        began = time.process_time()
        for _ in range(num_steps):
            with timer.waiting_for_data():
                pass
            timer.start()
            timer.stop(32)
            allocator.observe()
        return time.process_time() - began

    # The best of several, in this process's own time: others on the machine do not count.
    microseconds = 1e6 * min(seconds() for _ in range(5)) / num_steps
    assert microseconds < 1000 * _STEP_MS / 100
    assert (allocator.report() or {})["accelerator_memory_reserved_avg"] == 7


def _counters() -> dict[str, Any]:
    """As large as CUDA's: 13 counters, each of 3 pools, in 4 ways."""
    names = ["reserved_bytes", *(f"counter {number}" for number in range(12))]
    ways = ("current", "peak", "allocated", "freed")
    return {name: {pool: dict.fromkeys(ways, 7) for pool in ("all", "small", "large")} for name in names}
