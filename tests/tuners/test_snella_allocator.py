"""SNELLA's allocation: the published runs to the entry, any size, any scores, and resumption."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from snell_scale.tuners.snella.allocator import BudgetSchedule, FactorStep, SparsityAllocator, share_out

GOLDEN = Path(__file__).parent / "golden"
RUNS: list[dict[str, Any]] = json.loads((GOLDEN / "golden_alloc.json").read_text())


@pytest.fixture(scope="module")
def factors() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden_alloc.npz") as archive:
        return dict(archive)


def allocator_of(run: dict[str, Any]) -> SparsityAllocator:
    schedule = BudgetSchedule(
        init_sparsity=run["init_sparsity"],
        target_sparsity=run["target_sparsity"],
        total_ticks=run["total"],
        init_warmup=run["init_warmup"],
        final_warmup=run["final_warmup"],
        mask_interval=run["mask_interval"],
    )
    matrices = {f"l{i}": (1, a * b) for i, (a, b) in enumerate(run["shapes_in_out"])}
    return SparsityAllocator(matrices, schedule, beta1=run["beta1"], beta2=run["beta2"])


def golden_steps(run: dict[str, Any], factors: dict[str, np.ndarray], tick: int) -> list[dict[str, FactorStep]]:
    """The tick's optimizer steps; the file's (H, n, r/H) factors become one group."""

    def tensor(step: int, name: str, factor: str) -> torch.Tensor:
        return torch.from_numpy(factors[f"{run['id']}/{tick}/{step}/{name}/{factor}"])[None]

    names = [f"l{i}" for i in range(len(run["shapes_in_out"]))]
    return [
        {n: FactorStep(*(tensor(step, n, f) for f in ("A", "B", "A_grad", "B_grad"))) for n in names}
        for step in range(run["steps_per_epoch"])
    ]


def play(
    run: dict[str, Any], factors: dict[str, np.ndarray], allocator: SparsityAllocator, ticks: range
) -> list[list[float]]:
    history = []
    current = [run["init_sparsity"]] * len(run["shapes_in_out"])
    for tick in ticks:
        allocation = allocator.allocate(tick)
        if allocation is not None:
            current = [share for shares in allocation.values() for share in shares]
        history.append(current)
        if tick < run["total"] - 1:  # the file ends with the last update
            for steps in golden_steps(run, factors, tick):
                allocator.update(steps)
    return history


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"run{run['id']}")
def test_published_runs_are_reproduced(run: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    history = play(run, factors, allocator_of(run), range(run["total"]))
    # One entry more or less would show as 1/1536 = 6.5e-4.
    np.testing.assert_allclose(history, run["sparsity_after_update"], rtol=0, atol=1e-12)


def test_resumption_is_bit_identical(factors: dict[str, np.ndarray], tmp_path: Path) -> None:
    run, cut = RUNS[0], 4
    whole = play(run, factors, allocator_of(run), range(run["total"]))
    first = allocator_of(run)
    play(run, factors, first, range(cut))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = allocator_of(run)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert play(run, factors, second, range(cut, run["total"])) == whole[cut:]


def test_stacked_matrices_score_as_separate_ones(factors: dict[str, np.ndarray]) -> None:
    steps = golden_steps(RUNS[0], factors, 0)
    single = SparsityAllocator(
        {"a": (1, 960), "b": (1, 960)}, allocator_of(RUNS[0]).schedule, beta1=0.9, beta2=0.8
    )
    stacked = SparsityAllocator({"ab": (2, 960)}, single.schedule, beta1=0.9, beta2=0.8)
    for step in steps:
        A, B, dA, dB = (part for part in step["l0"] if part is not None)
        single.update({"a": FactorStep(A, B, dA, dB), "b": FactorStep(2 * A, 3 * B, dA, dB)})
        pairs = torch.cat([A, 2 * A]), torch.cat([B, 3 * B]), torch.cat([dA, dA]), torch.cat([dB, dB])
        stacked.update({"ab": FactorStep(*pairs)})
    assert stacked.scores() == single.scores()
    assert single.scores()[0] > 0


@pytest.mark.parametrize("overflow", [math.nan, math.inf])
def test_moving_averages_by_hand(overflow: float) -> None:
    allocator = SparsityAllocator({"x": (1, 4)}, allocator_of(RUNS[0]).schedule, beta1=0.5, beta2=0.25)
    A, B = torch.full((1, 1, 2, 1), 2.0), torch.full((1, 1, 2, 1), 1.0)
    dA = torch.tensor([3.0, overflow]).view(1, 1, 2, 1)
    allocator.update({"x": FactorStep(A, B, dA, None)})
    # I = (6, 0): Ī = (3, 0), U = 0.75·|I − Ī| = (2.25, 0); the score is their mean product 3.375, B's is 0.
    assert allocator.scores() == [3.375]


def test_nothing_gathered_shares_equally() -> None:
    allocator = allocator_of(RUNS[0])
    allocation = allocator.allocate(1)
    assert allocation is not None
    kept = [
        round((1 - shares[0]) * size)
        for shares, (_, size) in zip(allocation.values(), allocator.matrices.values(), strict=True)
    ]
    assert kept == [910, 910, 910]  # ⌊2731 / 3⌋ each


@pytest.mark.parametrize(
    ("budget", "sizes", "scores", "expected"),
    [
        (0, [5, 7], [1.0, 2.0], [0, 0]),
        (12, [5, 7], [1.0, 2.0], [5, 7]),
        (99, [5, 7], [0.0, 0.0], [5, 7]),
        (6, [5, 7], [0.0, 0.0], [3, 3]),
        (9, [4, 100, 100], [1.0, 0.0, 0.0], [4, 2, 2]),  # score 0 has room when the scored are full
        (6, [5, 7], [math.nan, 1.0], [0, 6]),
        (6, [5, 7], [math.inf, 1.0], [5, 1]),
        (6, [5, 7], [3e38, 3e38], [3, 3]),
    ],
)
def test_edges(budget: float, sizes: list[int], scores: list[float], expected: list[int]) -> None:
    assert share_out(budget, sizes, scores) == expected


@settings(max_examples=200, deadline=None)
@given(
    matrices=st.lists(
        st.tuples(st.integers(1, 2**36), st.floats(0, 1, allow_subnormal=True)), min_size=1, max_size=40
    ),
    fraction=st.floats(0, 1),
)
def test_budget_is_met_at_any_size(matrices: list[tuple[int, float]], fraction: float) -> None:
    check_share(matrices, fraction)


@settings(max_examples=200, deadline=None)
@given(
    matrices=st.lists(
        st.tuples(st.integers(1, 5000), st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 0.5, 1.0])),
        min_size=1,
        max_size=40,
    ),
    fraction=st.floats(0, 1),
)
def test_budget_is_met_by_small_matrices(matrices: list[tuple[int, float]], fraction: float) -> None:
    check_share(matrices, fraction)


def check_share(matrices: list[tuple[int, float]], fraction: float) -> None:
    sizes, scores = [size for size, _ in matrices], [score for _, score in matrices]
    total = sum(sizes)
    budget = math.floor(fraction * total)
    volumes = share_out(budget, sizes, scores)
    assert all(0 <= volume <= size for volume, size in zip(volumes, sizes, strict=True))
    # Each matrix drops its fraction of an entry, and a float32 sum of `total` is off by at most n ulp.
    rounding = len(sizes) * total * (2**-24 if total < 2**24 else 2**-53)
    assert budget - len(sizes) - rounding <= sum(volumes) <= budget
    if budget == total:
        assert volumes == sizes


def test_counts_beyond_two_to_the_31() -> None:
    sizes, budget = [2**33, 2**32, 3], 2**33 + 2**20 + 1
    volumes = share_out(budget, sizes, [1.0, 1.0, 1e-12])
    assert budget - 3 <= sum(volumes) <= budget
    assert volumes[1] == 2**32


def test_state_of_other_layers_is_refused() -> None:
    allocator = allocator_of(RUNS[0])
    with pytest.raises(ValueError, match="does not adapt"):
        allocator.load_state_dict({"elsewhere.A.importance": torch.zeros(1)})


def test_state_of_another_rank_is_refused() -> None:
    allocator = SparsityAllocator({"x": (1, 4)}, allocator_of(RUNS[0]).schedule, beta1=0.5, beta2=0.5)
    allocator.load_state_dict({"x.A.importance": torch.zeros(1, 1, 2, 3)})
    A = torch.ones(1, 1, 2, 1)
    with pytest.raises(ValueError, match="same rank"):
        allocator.update({"x": FactorStep(A, A, A, A)})


def test_sharded_factors_score_as_whole_ones(factors: dict[str, np.ndarray], tmp_path: Path) -> None:
    steps = golden_steps(RUNS[0], factors, 0)[0]
    whole, sharded = allocator_of(RUNS[0]), allocator_of(RUNS[0])
    whole.update(steps)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parts = {
            name: FactorStep(*(distribute_tensor(part, mesh, [Shard(2)]) for part in step if part is not None))
            for name, step in steps.items()
        }
        sharded.update(parts)
        assert sharded.scores() == whole.scores()
        assert sharded.allocate(1) == whole.allocate(1)
    finally:
        dist.destroy_process_group()
