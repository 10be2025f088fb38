"""FSDP2 on two processes trains as one process does, and keeps equal parts of everything on each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from snell_scale.assembly import assemble
from snell_scale.config import Config
from snell_scale.engines.fsdp2 import Fsdp2Config
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig
from tests.engines import fsdp2_worker
from tests.engines.fsdp2_cases import CASES, train, train_batch_norm
from tests.engines.fsdp2_worker import GRID_SIZE, HARD_CASE, OTHER_STEPS, RESUMED_CASE, SECONDS
from tests.spawned import WORLD_SIZE, free_ports, run_ranks

# Sums in float32 in another order: a few roundings (6e-8) of sums of terms up to 1. A step moves a weight by at
# most lr/eps = 10 times the difference of its gradients, themselves below 1e-7; five steps. Seen: 2e-7.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    run_ranks(fsdp2_worker.run, *free_ports(1), folder, seconds=SECONDS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


def test_fp16_is_refused():
    with pytest.raises(ValidationError, match="use bf16"):
        Fsdp2Config(device="cpu", precision="fp16")


def test_compilation_is_refused(tiny: Callable[..., Config]):
    with pytest.raises(ValueError, match=r"training.compile .*engine.name=ddp"):
        assemble(tiny("engine.name=fsdp2", "training.compile=true"))


def test_replicas_must_divide_the_ranks():
    with pytest.raises(ValueError, match=r"engine.replicas=3 does not divide the 4 rank"):
        Fsdp2Config(device="cpu", replicas=3).build(Ranks(world_size=4))


@pytest.mark.slow
def test_replicas_in_parts_train_as_one_process_does(tmp_path: Path):
    """Two replicas on four ranks: norms are of the parts of one replica, gradients means over all ranks."""
    run_ranks(fsdp2_worker.run_grid, *free_ports(1), tmp_path, seconds=SECONDS, world_size=GRID_SIZE)
    grid = [torch.load(tmp_path / f"grid{rank}.pt") for rank in range(GRID_SIZE)]
    for name in (HARD_CASE, RESUMED_CASE):
        _assert_same(grid[0][name], _alone(name))
        assert all(told[name]["losses"] == grid[0][name]["losses"] for told in grid)


@pytest.mark.parametrize("name", ["batch norm", "batch norm, ddp"])
def test_batch_statistics_are_the_mean_of_the_ranks(ranks: list[dict[str, Any]], name: str):
    """The running means are then those of one process."""
    first, other = (rank[name] for rank in ranks)
    alone = train_batch_norm(SingleConfig(device="cpu").build(Ranks()))
    assert first.keys() == alone.keys()
    assert all(torch.equal(first[key], other[key]) for key in first)
    assert not torch.equal(first["1.running_mean"], torch.zeros(4))
    torch.testing.assert_close(first["1.running_mean"], alone["1.running_mean"], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_process_does(ranks: list[dict[str, Any]], name: str):
    _assert_same(ranks[0]["cases"][name], _alone(name))


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_and_only_the_first_gathers(ranks: list[dict[str, Any]], name: str):
    first, other = (rank["cases"][name] for rank in ranks)
    for told in ("losses", "norms", "evaluations", "sparsities"):
        assert first[told] == other[told]  # the same numbers, for each comes from one all-reduce
    assert other["trained"] == {}
    assert first["frozen_gradients"] == other["frozen_gradients"] == []


def test_blocks_that_stay_whole_until_backward(ranks: list[dict[str, Any]]):
    """The averaged weights of an evaluation do not stay behind in the whole blocks."""
    _assert_same(ranks[0]["stays whole"], _alone("lora averaged"))


@pytest.mark.parametrize("engine", ["replicas", "ddp"])
def test_replicas_count_no_gradient_twice(ranks: list[dict[str, Any]], engine: str):
    _assert_same(ranks[0][engine], _alone(HARD_CASE))


def test_resumes_bit_for_bit(ranks: list[dict[str, Any]]):
    """Factors, moments and scores, from a checkpoint of the same two ranks."""
    whole, resumed = ranks[0]["cases"][RESUMED_CASE], ranks[0]["resumed"]
    assert resumed["losses"] == whole["losses"][-len(OTHER_STEPS) :]
    assert resumed["sparsities"] == whole["sparsities"]
    for name, parameter in whole["trained"].items():
        assert torch.equal(resumed["trained"][name], parameter), name


def test_others_resume_what_it_wrote(ranks: list[dict[str, Any]], folder: Path):
    """One process, and ranks that share otherwise, go on as if they had trained from the start."""
    whole = _alone(RESUMED_CASE)
    rest = {**whole, **{told: whole[told][-len(OTHER_STEPS) :] for told in ("losses", "norms")}}
    engine = SingleConfig(device="cpu").build(Ranks())
    resumed = train(engine, CASES[RESUMED_CASE], steps=OTHER_STEPS, resume=folder / "checkpoint")
    _assert_same(resumed, rest)
    _assert_same(ranks[0]["resumed by replicas"], rest)


def test_bf16_frozen_weights(ranks: list[dict[str, Any]]):
    """Forward rounds each sample alike wherever it is computed; gradients are bf16 sums (2^-8) over samples."""
    alone = train(SingleConfig(device="cpu", frozen_dtype="bf16").build(Ranks()), CASES[HARD_CASE])
    first = ranks[0]["bf16"]
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(alone["losses"]), atol=2**-8, rtol=0)
    torch.testing.assert_close(torch.tensor(first["norms"]), torch.tensor(alone["norms"]), atol=0, rtol=2**-5)


def test_nothing_changes_its_dtype(ranks: list[dict[str, Any]]):
    for name, told in ranks[0]["layout"].items():
        kept = (torch.float32, True) if told["trains"] else None
        assert told["dtype"] == (torch.float32 if told["trains"] else torch.bfloat16), name
        assert told["gradient"] == told["moments"] == kept, name


def test_every_rank_holds_its_share(ranks: list[dict[str, Any]]):
    """Each parameter with a dimension of even size in halves; what is left are biases of 3 and kernel scalars."""
    for name, first in ranks[0]["layout"].items():
        parts = [rank["layout"][name]["part"] for rank in ranks]
        assert sum(parts) == torch.Size(first["shape"]).numel()
        is_even = any(size % WORLD_SIZE == 0 for size in first["shape"])
        assert abs(parts[0] - parts[1]) <= (0 if is_even else 1), name
    factors = [told for name, told in ranks[0]["layout"].items() if ".snell_A." in name]
    assert {told["shape"][0] for told in factors} == {1, 3}  # the first dimension would not have done


@pytest.mark.parametrize("key", ["moved", "moved replicas"])
def test_scatter_gather_place(ranks: list[dict[str, Any]], key: str):
    first, other = (rank[key] for rank in ranks)
    assert first["gathered"].keys() == first["scattered"].keys() == first["before"].keys()
    for name, whole in first["scattered"].items():
        torch.testing.assert_close(first["gathered"][name], whole, rtol=0, atol=0, equal_nan=True)
    assert other["before"] == other["gathered"] == {}
    assert other["misplaced"] == []


def _alone(name: str) -> dict[str, Any]:
    return train(SingleConfig(device="cpu").build(Ranks()), CASES[name])


def _assert_same(sharded: dict[str, Any], alone: dict[str, Any]) -> None:
    for told in ("losses", "norms", "evaluations"):
        torch.testing.assert_close(
            torch.tensor(sharded[told]), torch.tensor(alone[told]), rtol=ROUNDING, atol=ROUNDING
        )
    assert sharded["trained"].keys() == alone["trained"].keys()
    for name, parameter in alone["trained"].items():
        torch.testing.assert_close(sharded["trained"][name], parameter, rtol=ROUNDING, atol=ROUNDING)
    # SNELLA counts entries: rounding may move one, of the 256 of the smallest matrix, to another matrix.
    for name, shares in alone["sparsities"].items():
        assert sharded["sparsities"][name] == pytest.approx(shares, abs=1.5 / 256)
