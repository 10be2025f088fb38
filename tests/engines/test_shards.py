"""Tensors and checkpoints of one and two processes: whole, sharded, read by other ranks, on a full disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snell_scale.engines.checkpoint import Checkpoints
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.shards import read_shards, shard_writer
from tests.engines import checkpoint_ranks
from tests.engines.checkpoint_ranks import whole_state
from tests.spawned import WORLD_SIZE

NAMES = sorted(whole_state(0))
BOTH_RANKS = range(WORLD_SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found, once for all tests."""
    return checkpoint_ranks.start(folder)


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("rank", BOTH_RANKS)
@pytest.mark.parametrize("part", ["_round_trip", "_from_one_rank", "_asynchronous"])
def test_two_ranks_read_every_tensor_bit_for_bit(answers: list[dict[str, Any]], part: str, rank: int) -> None:
    """What two ranks wrote, what one rank wrote, and what a thread wrote while all of it was overwritten."""
    assert answers[rank][part]["equal"] == dict.fromkeys(NAMES, True)


@pytest.mark.parametrize(("written", "step"), [("two", 3), ("async", 2)])
def test_one_rank_reads_what_two_wrote(
    folder: Path, answers: list[dict[str, Any]], written: str, step: int
) -> None:
    found = Checkpoints(folder / written, Ranks(), keep_last=2).newest()
    assert found is not None
    assert (found.step, found.own) == (step, None)
    state = zeros(whole_state(step))
    read_shards(found.folder, state, Ranks())
    for name, expected in whole_state(step).items():
        assert torch.equal(state[name], expected), name


@pytest.mark.parametrize("rank", BOTH_RANKS)
def test_each_rank_gets_its_own_part_and_all_the_common_one(answers: list[dict[str, Any]], rank: int) -> None:
    told = answers[rank]["_round_trip"]
    assert (told["step"], told["common"], told["own"]) == (3, {"step": 3}, {"rank": rank})
    assert answers[rank]["_from_one_rank"]["own"] is None
    told = answers[rank]["_asynchronous"]
    assert (told["step"], told["common"], told["own"]) == (2, 2, rank)


def test_two_ranks_keep_the_last_two(folder: Path, answers: list[dict[str, Any]]) -> None:
    assert sorted(p.name for p in (folder / "two").iterdir()) == ["step-00000002", "step-00000003"]


def test_the_manifest_knows_every_file(folder: Path, answers: list[dict[str, Any]]) -> None:
    newest = folder / "two" / "step-00000003"
    files = {p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file()}
    known = json.loads((newest / "manifest.json").read_text())["files"]
    assert set(known) == files - {"manifest.json"}
    assert {"common.pt", "rank-00000.pt", "rank-00001.pt", "shards/.metadata"} < set(known)
    assert len(known) == 4 + WORLD_SIZE  # and one file of tensors by each rank


def test_whole_tensors_are_written_once(folder: Path, answers: list[dict[str, Any]]) -> None:
    """Half of the bytes of the state are in whole tensors; written by both ranks they would be found twice."""
    content = b"".join(p.read_bytes() for p in sorted((folder / "two/step-00000003/shards").glob("*.distcp")))
    for name in ("float64", "int64"):
        assert content.count(whole_state(3)[name].numpy().tobytes()) == 1, name


@pytest.mark.parametrize(
    ("case", "full_rank"), [("shard", 1), ("own file", 1), ("common file", 0), ("manifest", 0)]
)
def test_a_full_disk_on_one_rank_is_the_same_error_on_all(
    answers: list[dict[str, Any]], folder: Path, case: str, full_rank: int
) -> None:
    first, second = (told["_full_disk"][case] for told in answers)
    assert first == second
    for part in (
        "step 2",
        str(folder / "full"),
        "File too large",
        f"rank {full_rank}",
        "Earlier",
        "--resume auto",
    ):
        assert part in first["message"]
    assert first["left"] == ["step-00000001"]
    assert first["newest"] == 1


def test_a_full_disk_in_the_background_is_told_by_the_next_save(answers: list[dict[str, Any]]) -> None:
    first, second = (told["_full_disk_asynchronous"] for told in answers)
    assert first == second
    assert "step 1" in first["message"]
    assert "(on rank 1)" in first["message"]
    assert first["left"] == ["step-00000003"]


@pytest.mark.parametrize("rank", BOTH_RANKS)
def test_what_does_not_fit_is_named_on_every_rank(answers: list[dict[str, Any]], rank: int) -> None:
    told = answers[rank]["_misfit"]
    assert "lacks 5 tensor(s) (new.0, new.1, new.2, …)" in told["missing"]
    assert "rows is (4, 3) there and (4, 5) here" in told["shape"]


def test_all_ranks_pass_over_a_damaged_checkpoint(answers: list[dict[str, Any]]) -> None:
    assert [told["_damage"] for told in answers] == [1, 1]


def test_staged_copies_do_not_follow_the_live_tensors(tmp_path: Path) -> None:
    live = whole_state(1)
    write = shard_writer(live, staged=True)
    for tensor in live.values():
        tensor.zero_()
    files = write(tmp_path, Ranks())
    assert [p.name for p in files] == ["__0_0.distcp", ".metadata"]
    state = zeros(live)
    read_shards(tmp_path, state, Ranks())
    assert all(torch.equal(state[name], expected) for name, expected in whole_state(1).items())


def test_parameters_are_read_in_place(tmp_path: Path) -> None:
    """The optimizer holds these very tensors, and autograd must not record the reading."""
    layer = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    shard_writer(dict(layer.named_parameters()), staged=False)(tmp_path, Ranks())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    addresses = [p.data_ptr() for p in layer.parameters()]
    read_shards(tmp_path, dict(layer.named_parameters()), Ranks())
    assert [p.data_ptr() for p in layer.parameters()] == addresses
    for name, parameter in layer.named_parameters():
        assert parameter.is_leaf
        assert torch.equal(parameter.detach(), before[name])
