"""Whole runs: their records, every method, resuming with identical losses, and every way a run can end."""

import json
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import Tensor

from snell_scale import registry
from snell_scale.assembly import assemble
from snell_scale.config import Config
from snell_scale.engines.single import SingleEngine
from snell_scale.records import MEMORY_CATEGORIES, read_result, read_steps
from snell_scale.run import run
from snell_scale.run_folder import locked
from tests.stopping import stop_in_step

MakeConfig = Callable[..., Config]


def folder_of(config: Config) -> Path:
    return Path(config.output_dir) / config.name


def losses(config: Config) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_steps(folder_of(config)) if "split" not in line]


class Killed(BaseException):
    """Stands for a process that ends without a chance to save."""


def kill_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original, count = SingleEngine.step, 0

    def counted(self: SingleEngine) -> Tensor:
        nonlocal count
        count += 1
        if count == step:
            raise Killed
        return original(self)

    monkeypatch.setattr(SingleEngine, "step", counted)


@pytest.mark.parametrize("method", registry.names("method"))
def test_every_method_runs_and_leaves_a_complete_record(tiny: MakeConfig, method: str) -> None:
    config = tiny(f"method.name={method}")
    result = run(config, quiet=True)
    folder = folder_of(config)
    assert result.status == "ok"
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result.__dict__))
    assert read_result(folder).metrics["test"].keys() >= {"top1", "loss"}
    assert result.steps == result.total_steps == 8
    assert [step for step, _ in losses(config)] == list(range(1, 9))
    assert result.num_trainable_params is not None
    assert result.num_total_params is not None
    assert 0 < result.num_trainable_params <= result.num_total_params * 1.5
    files = [path for path in (folder / "adapter").rglob("*") if path.is_file()]
    assert result.file_size == sum(path.stat().st_size for path in files) > 0
    assert result.memory is not None
    assert result.memory["phases"].keys() == {"load", "forward", "backward", "step", "evaluate"}
    for phase in result.memory["phases"].values():
        assert phase["total_bytes"] == sum(phase[f"{category}_bytes"] for category in MEMORY_CATEGORIES)
    assert result.throughput["images_per_s"] is not None
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == version("torch")


@pytest.mark.parametrize("method", ["snell", "snella", "lora", "gps", "full"])
def test_a_killed_run_resumes_with_identical_losses(
    tiny: MakeConfig, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"method.name={method}", "training.ema_decay=0.9", "training.gradient_accumulation=2")
    whole = tiny(*options, "name=whole")
    expected = run(whole, quiet=True)
    broken = tiny(*options, "name=broken")
    for kill_step in (6, 2):  # the second attempt starts after step 4 and dies in its second step
        with monkeypatch.context() as patch:
            kill_at_step(patch, kill_step)
            with pytest.raises(Killed):
                run(broken, resume="auto", quiet=True)
        assert read_result(folder_of(broken)).status == "failed"
    result = run(broken, resume="auto", quiet=True)
    assert losses(broken) == losses(whole)  # bit-identical: the same arithmetic in the same order
    assert result.metrics == expected.metrics
    assert result.best_step == expected.best_step
    assert result.resumed_from_steps == (4,)
    assert result.memory is not None
    assert expected.memory is not None
    assert result.memory["peak"] == expected.memory["peak"]
    assert result.seconds["train"] > 0


def test_a_finished_run_is_not_run_again(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    first = run(config, quiet=True)
    kill_at_step(monkeypatch, 1)
    assert run(config, resume="auto", quiet=True).metrics == first.metrics


def test_a_folder_holds_one_run(tiny: MakeConfig) -> None:
    run(tiny(), quiet=True)
    with pytest.raises(ValueError, match="--resume auto"):
        run(tiny(), quiet=True)
    with pytest.raises(ValueError, match=r"differs in training\.lr"):
        run(tiny("training.lr=1e-3"), resume="auto", quiet=True)
    assert run(tiny("training.lr=1e-3"), overwrite=True, quiet=True).status == "ok"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_continues_later(
    tiny: MakeConfig, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny("name=whole"), quiet=True)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3, number)
        config = tiny("checkpoint.every_steps=null")
        result = run(config, quiet=True)
    assert (result.status, result.steps) == ("interrupted", 3)
    result = run(config, resume="auto", quiet=True)
    assert (result.status, result.resumed_from_steps) == ("ok", (3,))
    assert losses(config) == losses(tiny("name=whole"))


@pytest.mark.parametrize("option", ["training.activation_checkpointing=true", "training.gradient_accumulation=2"])
def test_memory_savers_do_not_change_the_mathematics(tiny: MakeConfig, option: str) -> None:
    # Without dropout: a recomputed or split batch draws other masks.
    plain = tiny("name=plain", "model.arguments.proj_drop_rate=0.0")
    saver = tiny("name=saver", "model.arguments.proj_drop_rate=0.0", option)
    assert run(plain, quiet=True).status == run(saver, quiet=True).status == "ok"
    for (_, a), (_, b) in zip(losses(plain), losses(saver), strict=True):
        # Sums in another order: fp32 rounding (6e-8) over eight Adam steps, which divide by small moments.
        assert abs(a - b) <= 2e-4 * abs(a)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "snell", "snella"])
def test_a_compiled_run_follows_the_eager_one(tiny: MakeConfig, method: str) -> None:
    options = (f"method.name={method}", "model.arguments.proj_drop_rate=0.0")
    eager, compiled = tiny(*options, "name=eager"), tiny(*options, "name=compiled", "training.compile=true")
    assert run(eager, quiet=True).status == run(compiled, quiet=True).status == "ok"
    for (_, a), (_, b) in zip(losses(eager), losses(compiled), strict=True):
        # Fused kernels round elsewhere (6e-8 each); Adam divides by small moments over eight steps.
        assert abs(a - b) <= 2e-4 * abs(a)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(tiny: MakeConfig, precision: str) -> None:
    full = tiny("name=fp32", "model.arguments.proj_drop_rate=0.0")
    mixed = tiny("name=mixed", "model.arguments.proj_drop_rate=0.0", f"engine.precision={precision}")
    run(full, quiet=True)
    assert run(mixed, quiet=True).status == "ok"
    first_full, first_mixed = losses(full)[0][1], losses(mixed)[0][1]
    assert first_full != first_mixed
    assert abs(first_full - first_mixed) < 2**-8 * 4  # bf16 keeps 8 bits; a few roundings deep, loss about 1


def test_frozen_weights_can_be_bf16(tiny: MakeConfig) -> None:
    result = run(tiny("engine.frozen_dtype=bf16"), quiet=True)
    whole = run(tiny("name=whole"), quiet=True)
    assert result.status == "ok"
    assert result.memory is not None
    assert whole.memory is not None
    load = [r.memory["phases"]["load"]["parameters_bytes"] for r in (result, whole) if r.memory]
    assert load[0] < load[1]


def test_best_test_protocol_is_labelled(tiny: MakeConfig) -> None:
    config = tiny("evaluation.protocol=best-test")
    assert run(config, quiet=True).protocol == "best-test"
    splits = {line["split"] for line in read_steps(folder_of(config)) if "split" in line}
    assert splits == {"test"}
    honest = tiny("name=honest")
    run(honest, quiet=True)
    assert {line["split"] for line in read_steps(folder_of(honest)) if "split" in line} == {"validation"}


def test_bad_input_is_refused_before_anything_is_written(tiny: MakeConfig) -> None:
    for override, expected in [
        ("engine.device=cuda:7", "CUDA device"),
        ("training.batch_size=100", "training samples"),
        ("method.r=64", "r"),
        ("method.targets=nothing_like_this", "nothing_like_this"),
    ]:
        with pytest.raises(ValueError, match=expected):
            assemble(tiny(override))


def test_every_resume_is_remembered(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    for kill_step in (4, 3):
        with monkeypatch.context() as patch:
            kill_at_step(patch, kill_step)
            with pytest.raises(Killed):
                run(config, resume="auto", quiet=True)
    assert run(config, resume="auto", quiet=True).resumed_from_steps == (2, 4)


def test_a_damaged_result_does_not_block_a_resume(tiny: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny()
    run(config, quiet=True)
    (folder_of(config) / "result.json").write_text('{"name": ')
    assert run(config, resume="auto", quiet=True).status == "ok"
    assert "is damaged" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(tiny: MakeConfig) -> None:
    config = tiny()
    with locked(folder_of(config)), pytest.raises(ValueError, match="another process"):
        run(config, quiet=True)
    assert run(config, quiet=True).status == "ok"


def test_the_peak_is_of_training(tiny: MakeConfig) -> None:
    result = run(
        tiny("data.validation_per_class=60", "evaluation.batch_size=180", "method.name=probe"), quiet=True
    )
    assert result.memory is not None
    phases = result.memory["phases"]
    assert phases["evaluate"]["total_bytes"] > phases["forward"]["total_bytes"]
    assert result.memory["peak"]["phase"] in ("forward", "backward", "step")
