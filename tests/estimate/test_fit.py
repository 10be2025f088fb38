"""`snell-scale run --fit`: as few microbatches as fit, more where these were too few, the same batch."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations_with_replacement, product
from pathlib import Path
from typing import Any

import pytest
import torch

from snell_scale.attempt import blank_result
from snell_scale.config import Config
from snell_scale.engines.single import SingleEngine
from snell_scale.estimate import fit
from snell_scale.estimate.fit import run_fitted
from snell_scale.estimate.prediction import Estimator, Prediction
from snell_scale.estimate.settings import HEADROOM
from snell_scale.records import Result, Status, read_result, read_steps
from snell_scale.run import run
from tests.command_line import call
from tests.estimate.measured import CONFIGS, short

pytestmark = pytest.mark.usefixtures("in_this_process")
MakeConfig = Callable[..., Config]
BATCH = "training.batch_size=12"
SMALL_EVALUATION = "evaluation.batch_size=1"


class PretendedRun:
    """Ends as it is told, one call after the other, and keeps what it was given."""

    def __init__(self, *statuses: Status) -> None:
        self._statuses = iter(statuses)
        self.calls: list[tuple[Config, dict[str, Any]]] = []

    def __call__(self, config: Config, **settings: Any) -> Result:
        self.calls.append((config, settings))
        return replace(blank_result(config, {}), status=next(self._statuses))

    @property
    def ladder(self) -> list[int]:
        return [config.training.gradient_accumulation for config, _ in self.calls]


def _fitted(config: Config, pretended: PretendedRun, *, limit_bytes: int = 2**40, **given: Any) -> Result:
    settings = {"resume": "never", "overwrite": False, **given}
    return run_fitted(config, pretended, limit_bytes=limit_bytes, say=lambda _: None, **settings)


def _needed(config: Config) -> int:
    with Estimator(config, target="cpu") as estimator:
        return estimator.predict().needed_bytes


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is otherwise made in a process of its own, which takes seconds to start."""
    monkeypatch.setattr(fit, "_apart", lambda config, ranks, limit: fit.choose(config, 1, limit, "cpu"))


def test_where_all_fits_it_is_one_microbatch(tiny: MakeConfig) -> None:
    pretended = PretendedRun("ok")
    assert _fitted(tiny(BATCH, "training.gradient_accumulation=4"), pretended).status == "ok"
    assert pretended.ladder == [1]


@pytest.mark.parametrize("accumulation", [1, 2, 3, 4, 6, 12])
def test_the_fewest_that_fit(tiny: MakeConfig, accumulation: int) -> None:
    """A limit of what so many microbatches need is kept by these, and by no fewer that need more."""
    small = (BATCH, SMALL_EVALUATION)
    peaks = {n: _needed(tiny(*small, f"training.gradient_accumulation={n}")) for n in (1, 2, 3, 4, 6, 12)}
    pretended = PretendedRun("ok")
    _fitted(tiny(*small), pretended, limit_bytes=peaks[accumulation])
    assert pretended.ladder == [min(n for n in peaks if peaks[n] <= peaks[accumulation])]


def test_out_of_memory_is_tried_in_more_parts_in_the_same_folder(tiny: MakeConfig) -> None:
    pretended = PretendedRun("oom", "oom", "ok")
    assert _fitted(tiny(BATCH), pretended, overwrite=True, quiet=True).status == "ok"
    assert pretended.ladder == [1, 2, 3]
    assert {config.training.batch_size for config, _ in pretended.calls} == {12}
    assert len({(config.output_dir, config.name) for config, _ in pretended.calls}) == 1
    passed = [(given["resume"], given["overwrite"]) for _, given in pretended.calls]
    # What the first attempt began the others continue: nothing is thrown away a second time.
    assert passed == [("never", True), ("auto", False), ("auto", False)]
    assert all(given["quiet"] for _, given in pretended.calls)
    assert all(given["may_differ"] == ("training.gradient_accumulation",) for _, given in pretended.calls)


def test_after_single_samples_there_is_nothing_left_to_try(tiny: MakeConfig) -> None:
    pretended = PretendedRun("oom", "oom", "oom", "oom")
    assert _fitted(tiny("training.batch_size=6"), pretended).status == "oom"
    assert pretended.ladder == [1, 2, 3, 6]


@pytest.mark.parametrize("status", ["diverged", "interrupted", "failed"])
def test_what_is_not_memory_is_not_tried_again(tiny: MakeConfig, status: Status) -> None:
    pretended = PretendedRun(status)
    assert _fitted(tiny(BATCH), pretended).status == status
    assert pretended.ladder == [1]


def test_where_nothing_fits_it_is_said_before_anything_runs(tiny: MakeConfig) -> None:
    pretended = PretendedRun()
    with pytest.raises(ValueError, match=r"even a microbatch of 1 is estimated at .* of 0\.0 MiB; shard the"):
        _fitted(tiny(BATCH), pretended, limit_bytes=1000)
    assert pretended.calls == []


def test_an_evaluation_batch_must_fit_too(tiny: MakeConfig) -> None:
    config = tiny(BATCH, "evaluation.batch_size=512")
    with pytest.raises(ValueError, match=r"an evaluation batch is estimated at .*lower evaluation\.batch_size"):
        _fitted(config, PretendedRun(), limit_bytes=_needed(config) - 1)


@pytest.fixture
def rising(tmp_path: Path) -> Config:
    """One microbatch needs about 7.45 MB, two 8.26 and four 7.81.

    All weights train, and their gradients stand during the forwards of several: more than so small a batch saves.
    """
    options = ["method.name=full", "training.batch_size=4", SMALL_EVALUATION]
    config = short(CONFIGS / "demo/transfer.yaml", tmp_path, *options)
    with Estimator(config, target="cpu") as estimator:
        one, two, four = (estimator.predict(4 // n, n).needed_bytes for n in (1, 2, 4))
    assert one < four < two, "or there is nothing here to test"
    return config


def test_the_whole_batch_is_taken_where_parts_of_it_need_more(rising: Config) -> None:
    assert fit.choose(rising, 1, 7_600_000, "cpu")[0] == [1, 2, 4]


def test_a_refusal_names_what_needs_least(rising: Config) -> None:
    with pytest.raises(ValueError, match=r"microbatch of 4, the whole batch .* is estimated at 7\.1 MiB of 6\.7"):
        fit.choose(rising, 1, 7_000_000, "cpu")


def _predicted(accumulation: int, peak_bytes: int, evaluation_bytes: int = 0) -> Prediction:
    phases = {"evaluate": {"total_bytes": evaluation_bytes}}
    memory = {"peak": {"total_bytes": peak_bytes}, "phases": phases}
    size = 12 // accumulation
    return Prediction(memory, None, 1, 1, 1, size, 12, "cpu", (8, 8), 0.0)


def test_the_first_that_fits_where_one_alone_may_need_less() -> None:
    """Against trying each, of all short ladders; from two on what is needed never rises."""
    falling = (sizes for length in range(5) for sizes in combinations_with_replacement((3, 2, 1, 0), length))
    for several, alone, limit in product(falling, range(4), range(-1, 4)):
        needed = [alone, *several]
        ladder = list(range(1, len(needed) + 1))
        place, tried = fit._first_that_fits(ladder, limit, lambda n, sizes=needed: _predicted(n, sizes[n - 1]))
        assert place == next((i for i, size in enumerate(needed) if size <= limit), len(needed))
        if place < len(needed):
            assert tried[-1].needed_bytes == needed[place]
        else:
            assert min(prediction.needed_bytes for prediction in tried) == min(needed)


def test_a_refusal_names_all_that_does_not_fit(tiny: MakeConfig) -> None:
    config = tiny(BATCH, "engine.name=fsdp2", "training.activation_checkpointing=true")
    tried = [_predicted(1, 9 * 2**20, 5 * 2**20), _predicted(2, 4 * 2**20, 5 * 2**20)]
    text = fit._refusal(config, tried, 3 * 2**20)
    assert text == (
        "--fit: even a microbatch of 6 is estimated at 4.0 MiB of 3.0 MiB; train less of the model; "
        "and an evaluation batch is estimated at 5.0 MiB of 3.0 MiB; lower evaluation.batch_size"
    )


def test_the_hosts_share_is_of_what_the_group_leaves(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "group_free_bytes", lambda: 10_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fit._device_bytes(tiny()) == int((1 - HEADROOM) * 5_000)


def test_a_batch_that_ranks_cannot_share_is_refused(tiny: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"training\.batch_size=12 does not divide among 5 ranks"):
        fit.choose(tiny(BATCH, "engine.name=ddp"), 5, 2**40, "cpu")


def test_the_parts_are_of_one_ranks_share(tiny: MakeConfig) -> None:
    ladder, told = fit.choose(tiny(BATCH, "engine.name=ddp"), 2, 2**40, "cpu")
    assert ladder == [1, 2, 3, 6]
    assert told.startswith("fit: 1 microbatch(es) of 6 on each rank; estimated peak ")


def test_a_contrastive_batch_is_not_divided(tmp_path: Path) -> None:
    """Its loss compares all pairs of a batch."""
    config = short(CONFIGS / "contrastive/transfer.yaml", tmp_path)
    assert fit.choose(config, 1, 2**40, "cpu")[0] == [1]
    with pytest.raises(ValueError, match="even a microbatch of"):
        fit.choose(config, 1, 1000, "cpu")


def test_a_finished_run_is_not_estimated_again(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(BATCH)
    run(config, quiet=True)
    monkeypatch.setattr(fit, "choose", None)
    assert _fitted(config, PretendedRun(), resume="auto").status == "ok"
    with pytest.raises(ValueError, match="already holds a run"):
        _fitted(config, PretendedRun())


def test_a_fitted_run_follows_the_whole_one(
    tiny_file: Path, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without dropout: a divided batch draws other masks.
    options = ["model.arguments.proj_drop_rate=0.0", "model.arguments.embed_dim=64", "training.batch_size=24"]
    options.append(SMALL_EVALUATION)
    whole = tiny(*options, "name=whole")
    limit_bytes = _needed(whole) * 2 // 3
    given = f"{limit_bytes / (1 - HEADROOM):.0f}B"
    fitting = ["--fit", "--device-memory", given, "--quiet", "name=fitted"]
    code, out, _ = call(monkeypatch, capsys, "run", str(tiny_file), *options, *fitting)
    assert code == 0
    assert "fit: " in out
    fitted = read_result(tiny_file.parent / "runs" / "fitted")
    assert (fitted.status, fitted.batch_size) == ("ok", 24)
    assert fitted.conditions["gradient_accumulation"] > 1
    assert fitted.memory is not None
    assert fitted.memory["peak"]["total_bytes"] <= 1.03 * limit_bytes  # the promise of the estimate
    run(whole, quiet=True)
    pairs = zip(_losses(tiny_file, "fitted"), _losses(tiny_file, "whole"), strict=True)
    # Sums of eight samples and then of three parts, in float32 (6e-8), over eight steps of Adam.
    assert max(abs(a / b - 1) for a, b in pairs) <= 1e-5


def test_a_run_whose_estimate_was_fooled_continues_in_more_parts(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device gives out in the third step, though the estimate said that all fits."""
    microbatch, num_calls = SingleEngine.microbatch, 0

    def exhausted(self: SingleEngine, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        nonlocal num_calls
        num_calls += type(self) is SingleEngine  # and not the estimate's, which allocates nothing
        if num_calls == 3 and type(self) is SingleEngine:
            raise torch.OutOfMemoryError("out of memory, as a device says it")
        return microbatch(self, is_last=is_last)

    monkeypatch.setattr(SingleEngine, "microbatch", exhausted)
    fitting = ["--fit", "--device-memory", "8GiB", "--quiet"]
    code, out, _ = call(monkeypatch, capsys, "run", str(tiny_file), *fitting)
    assert code == 0
    assert "out of memory with 1 microbatch(es) a step" in out
    result = read_result(tiny_file.parent / "runs" / "tiny")
    assert (result.status, result.batch_size, result.steps) == ("ok", 8, 8)
    assert result.conditions["gradient_accumulation"] == 2
    assert list(result.resumed_from_steps) == [2]
    assert [line["step"] for line in read_steps(tiny_file.parent / "runs" / "tiny") if "split" not in line] == [
        *range(1, 9)
    ]


def _losses(tiny_file: Path, name: str) -> list[float]:
    lines = read_steps(tiny_file.parent / "runs" / name)
    return [line["loss"] for line in lines if "split" not in line]
