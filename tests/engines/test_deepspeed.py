"""DeepSpeed ZeRO on two processes trains as one process does, and keeps parts where it says so."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from snell_scale.engines.deepspeed_config import DeepSpeedConfig
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig, SingleEngine
from tests.engines import deepspeed_worker
from tests.engines.deepspeed_worker import (
    HARD_CASE,
    MIXED,
    NUM_BLOCKS,
    QUICK,
    SECOND_RUN,
    Key,
    jobs,
    last_updates,
    train_and_evaluate,
    train_masked,
)
from tests.engines.fsdp2_cases import CASES, NUM_STEPS, mask_of, train, train_batch_norm
from tests.spawned import WORLD_SIZE, free_ports, run_ranks

# Sums in float32 in another order: a few roundings (6e-8) of sums of terms up to 1. A step moves a weight by at
# most lr/eps = 10 times the difference of its gradients, themselves below 1e-7; five steps. Seen: 3e-7.
ROUNDING = 2e-6

SECONDS = 250


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes have left what they saw."""
    return _run(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("slow"), {*(jobs().keys() - QUICK), SECOND_RUN})


def _keys(*kinds: str) -> list[Any]:
    """Every key of these kinds as a parameter, marked where it is slow."""
    found = [key for key in jobs() if key[0] in kinds]
    return [pytest.param(key, marks=() if key in QUICK else pytest.mark.slow, id=str(key)) for key in found]


@pytest.fixture
def ranks(key: Key, request: pytest.FixtureRequest) -> list[Any]:
    """What each rank saw of the test's key."""
    folder: Path = request.getfixturevalue("quick" if key in QUICK else "slow")
    return [torch.load(folder / f"rank{rank}.pt")[key] for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("key", _keys("train"))
def test_trains_as_one_process_does(ranks: list[dict[str, Any]], key: Key) -> None:
    _assert_same(ranks[0], train(_alone(), CASES[key[2]]))


@pytest.mark.parametrize("key", _keys("train"))
def test_ranks_agree_and_only_the_first_gathers(ranks: list[dict[str, Any]], key: Key) -> None:
    first, other = ranks
    for told in ("losses", "norms", "sparsities"):
        assert first[told] == other[told]  # the same numbers, for each comes from one reduction
    assert other["trained"] == {}
    assert first["frozen_gradients"] == other["frozen_gradients"] == []


@pytest.mark.parametrize("key", _keys("updates"))
def test_the_last_update_is_whole_on_every_rank(ranks: list[dict[str, Any]], key: Key) -> None:
    """Value and clipped gradient of every factor, with the learning rate that was set after setup."""
    expected = last_updates(_alone())
    for rank in ranks:
        assert rank.keys() == expected.keys()
        for name, (value, gradient) in rank.items():
            torch.testing.assert_close(gradient, expected[name][1], atol=1e-7, rtol=0)
            # lr/eps = 500 times a difference of gradients that was 2e-8 at most
            torch.testing.assert_close(value, expected[name][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", _keys("masked"))
def test_edited_gradients(ranks: list[dict[str, Any]], key: Key) -> None:
    expected = train_masked(_alone())
    assert len(expected) == 2
    for name, change in ranks[0].items():
        assert torch.equal(change != 0, mask_of(change))
        torch.testing.assert_close(change, expected[name], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("key", _keys("batch norm"))
def test_batch_statistics_are_the_mean_of_the_ranks(ranks: list[dict[str, Any]], key: Key) -> None:
    first, other = ranks
    alone = train_batch_norm(_alone())
    assert all(torch.equal(first[name], other[name]) for name in first)
    torch.testing.assert_close(first["1.running_mean"], alone["1.running_mean"], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("key", _keys("evaluated"))
def test_evaluations_of_the_module_itself_between_steps(ranks: list[dict[str, Any]], key: Key) -> None:
    assert ranks[0] == pytest.approx(train_and_evaluate(_alone()), abs=ROUNDING)


@pytest.mark.parametrize("key", _keys("resumed"))
def test_resumed_training_is_identical(ranks: list[dict[str, Any]], key: Key) -> None:
    for rank in ranks:
        losses, again = rank["losses"]
        assert losses == again
        weights, again = rank["weights"]
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        extra, read = rank["extra"]
        assert all(torch.equal(extra[name], read[name]) for name in extra)


@pytest.mark.parametrize("key", _keys("resumed"))
def test_each_file_is_of_one_rank(ranks: list[dict[str, Any]], key: Key) -> None:
    first, other = ranks
    assert sorted(first["written"] + other["written"]) == other["lying there"]
    assert any("optim_states" in path for path in other["written"])
    assert not any(Path(path).name == "latest" for path in other["lying there"])


@pytest.mark.parametrize("key", _keys("moved"))
def test_what_is_scattered_is_gathered(ranks: list[dict[str, Any]], key: Key) -> None:
    assert ranks[0]["gathered"].keys() == ranks[0]["scattered"].keys()
    assert ranks[1]["gathered"] == {}
    for name, tensor in ranks[0]["gathered"].items():
        torch.testing.assert_close(tensor, ranks[0]["scattered"][name], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("key", _keys("released"))
def test_frozen_weights_are_released_between_forward_and_backward(ranks: list[list[int]], key: Key) -> None:
    for held in ranks:
        assert held == [0, 0, 0, 0]


@pytest.mark.parametrize("key", _keys("prefetched"))
def test_few_blocks_are_prefetched(ranks: list[list[int]], key: Key) -> None:
    """The last one, and one or two more that backward begins with; DeepSpeed's own settings keep all."""
    for held in ranks:
        assert max(held) <= 3 < NUM_BLOCKS


@pytest.mark.parametrize("key", _keys("mixed"))
def test_bf16(ranks: list[dict[str, Any]], key: Key) -> None:
    """bf16 (2^-8) products of samples that are grouped otherwise; five steps."""
    expected, found = train(_alone(**MIXED[key[2]]), CASES[HARD_CASE]), ranks[0]
    assert found["losses"] == pytest.approx(expected["losses"], abs=2**-8)
    assert sum(found["norms"], []) == pytest.approx(_whole(expected["norms"]), rel=2**-5)
    assert {tensor.dtype for tensor in found["trained"].values()} == {torch.float32}
    # The rounding is there: this is no float32 run.
    assert found["losses"] != pytest.approx(train(_alone(), CASES[HARD_CASE])["losses"], abs=ROUNDING)


@pytest.mark.parametrize("key", _keys("fp16"))
def test_fp16_scales_the_loss(ranks: list[dict[str, Any]], key: Key) -> None:
    told = ranks[0]
    assert told["norms"][0] == float("inf")
    assert told["unmoved"]
    assert told["state"] == {"scale": 2.0**39, "good_steps": 0}
    # fp16 rounds to 2^-11, over some products one after the other
    expected = _whole(train(_alone(), CASES["lora clipped, accumulated"])["norms"])[0]
    assert told["norms"][1] == pytest.approx(expected, rel=2**-5)
    assert told["next"] == {"scale": 2.0**8, "good_steps": 1}


@pytest.mark.parametrize("key", _keys("offloaded", "second run"))
def test_offloaded_and_second_in_the_process(ranks: list[dict[str, Any]], key: Key) -> None:
    _assert_same(ranks[0], train(_alone(), CASES[HARD_CASE]))


@pytest.mark.parametrize("key", _keys("own bf16"))
def test_bf16_of_its_own_turns_all_parameters_to_bf16(ranks: list[dict[str, Any]], key: Key) -> None:
    assert ranks[0]["dtypes"] == {torch.bfloat16}
    expected = train(_alone(), CASES["lora clipped, accumulated"])["losses"][0]
    assert ranks[0]["loss"] == pytest.approx(expected, abs=2**-6)  # a few roundings of 2^-8 of a loss about 1


def test_autocast_holds_where_deepspeed_turns_it_off() -> None:
    """As it does on a GPU: there it calls the model with autocast disabled."""
    engine = DeepSpeedConfig(device="cpu", precision="bf16").build(Ranks())
    model = torch.nn.Linear(4, 4)
    engine._autocast_inside(model)
    with engine.autocast(), torch.autocast("cpu", enabled=False):
        assert model(torch.ones(1, 4)).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 5))
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("part", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_process_is_left_as_it_was(part: str, request: pytest.FixtureRequest) -> None:
    """Nothing is printed (nor compiled: that, too, would be told) but skipped steps."""
    folder: Path = request.getfixturevalue(part)
    for rank in range(WORLD_SIZE):
        assert torch.load(folder / f"rank{rank}.pt")["linear is torch's"]
        lines = (folder / f"rank{rank}.log").read_text().splitlines()
        assert [line for line in lines if "Skipping step" not in line] == []


def _run(folder: Path, keys: set[Key]) -> Path:
    run = partial(deepspeed_worker.run, keys=keys)
    try:
        # A port for each run: the store of the first still listens when the second starts.
        run_ranks(run, free_ports(2), folder, seconds=SECONDS)
    finally:
        print(*(path.read_text() for path in folder.glob("*.log")))
    return folder


def _alone(**settings: Any) -> SingleEngine:
    return SingleConfig(device="cpu", **settings).build(Ranks())


def _whole(norms: list[list[float]]) -> list[float]:
    """One norm of all groups by step, as DeepSpeed tells it."""
    return [torch.tensor(groups).norm().item() for groups in norms]


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["losses"]) == NUM_STEPS
    assert found["losses"] == pytest.approx(expected["losses"], abs=ROUNDING)
    assert sum(found["norms"], []) == pytest.approx(_whole(expected["norms"]), abs=ROUNDING)
    assert found["sparsities"] == expected["sparsities"]
    assert found["trained"].keys() == expected["trained"].keys()
    for name, weight in expected["trained"].items():
        torch.testing.assert_close(found["trained"][name], weight, atol=ROUNDING, rtol=0)
