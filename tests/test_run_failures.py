"""A run that fails, or is refused, says why in its record or before it leaves one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snell_scale.config import Config
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleEngine
from snell_scale.interfaces import Batch, StepOutput
from snell_scale.records import read_result
from snell_scale.run import run
from snell_scale.run_folder import check_same_everywhere
from snell_scale.tasks.classification import Classification
from tests.stopping import stop_in_step

MakeConfig = Callable[..., Config]


def folder_of(config: Config) -> Path:
    return Path(config.output_dir) / config.name


def test_divergence_is_a_result(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = Classification.__call__, 0

    def exploding(self: Classification, model: nn.Module, batch: Batch) -> StepOutput:
        nonlocal count
        count += 1
        output = original(self, model, batch)
        return StepOutput(loss=output["loss"] * float("nan"), outputs=output["outputs"]) if count == 5 else output

    monkeypatch.setattr(Classification, "__call__", exploding)
    result = run(tiny(), quiet=True)
    assert result.status == "diverged"
    assert result.divergence is not None
    assert result.divergence["step"] == 5
    assert set(result.divergence["groups"]) == {"decayed", "undecayed"}
    assert "training.lr" in (result.message or "")


def test_out_of_memory_is_a_result(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: SingleEngine, loss: Tensor) -> None:
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(SingleEngine, "backward", exhausted)
    config = tiny()
    assert run(config, quiet=True).status == "oom"
    result = read_result(folder_of(config))
    assert result.status == "oom"
    assert (result.total_steps, result.steps) == (8, 0)
    assert result.num_trainable_params
    assert run(config, resume="auto", quiet=True).status == "oom"  # a result that stands is not tried again
    monkeypatch.undo()
    assert run(config, resume="auto", quiet=True).status == "oom"
    # With another engine it may fit.
    assert run(tiny("engine.name=fsdp2"), resume="auto", quiet=True).status == "ok"


def test_ranks_of_different_configs_are_refused(tiny: MakeConfig) -> None:
    class Two(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "training": {**value["training"], "lr": 1.0}}]

    check_same_everywhere(tiny(), Ranks())
    with pytest.raises(ValueError, match=r"rank 1 .* training\.lr\. Start all ranks with the same"):
        check_same_everywhere(tiny(), Two())


def test_overwriting_does_not_wipe_what_torchrun_restarts(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert run(tiny(), overwrite=True, quiet=True).status == "interrupted"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = run(tiny(), overwrite=True, quiet=True)
    assert (result.status, result.resumed_from_steps) == ("ok", (3,))


def test_any_other_failure_is_recorded_and_raised(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SingleEngine, loss: Tensor) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(SingleEngine, "backward", broken)
    config = tiny()
    with pytest.raises(KeyError, match="a bug"):
        run(config, quiet=True)
    result = read_result(folder_of(config))
    assert result.status == "failed"
    assert "KeyError" in (result.message or "")


def test_a_failure_before_the_first_step_is_recorded_too(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SingleEngine, *arguments: object, **options: object) -> None:
        raise KeyError("a bug in setup")

    monkeypatch.setattr(SingleEngine, "setup", broken)
    config = tiny()
    with pytest.raises(KeyError, match="a bug in setup"):
        run(config, quiet=True)
    assert read_result(folder_of(config)).status == "failed"
